"""`python -m tandem_operator.cli`: the same as the tandem command."""

from tandem_operator.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
