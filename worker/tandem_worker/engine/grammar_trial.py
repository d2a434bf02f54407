"""The child process in which a grammar from outside is built for the first time.

A few lines of schema can keep a grammar compiler busy for hours (thirty patterns in an ``allOf``),
and a thread cannot be stopped. The parent, ``server/grammar_check``, ends this process instead.

Messages are lines of JSON: first the tokenizer, then one grammar each; an answer per line.
"""

from __future__ import annotations

import json
import sys

from tandem_worker.engine.constraints import GrammarError, build_matcher, open_tokenizer


def main() -> None:
    """Serve until the parent closes its end."""
    first = json.loads(sys.stdin.readline())
    tokenizer = open_tokenizer(first["tokenizer"], first["vocab_size"], frozenset(first["eos"]))
    print("{}", flush=True)
    for line in sys.stdin:
        problem = None
        try:
            build_matcher(tokenizer, json.loads(line))
        except GrammarError as error:
            problem = str(error)
        print(json.dumps({"problem": problem}), flush=True)


if __name__ == "__main__":
    main()
