// The openai and Anthropic clients of Node, as their users use them.
import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";

const url = process.argv[2];
const found = {};
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What is 12 + 30?" }];
const parameters = {
  type: "object",
  properties: { a: { type: "integer" }, b: { type: "integer" } },
};

const whole = await client.chat.completions.create({ model: "chat", messages });
found.whole = whole.choices[0].message.content;
const stream = await client.chat.completions.create({ model: "chat", messages, stream: true });
found.stream = "";
for await (const chunk of stream) found.stream += chunk.choices[0]?.delta?.content ?? "";
const runner = client.chat.completions.runTools({
  model: "chat",
  messages,
  stream: true,
  tools: [
    {
      type: "function",
      function: {
        name: "add",
        parameters,
        parse: JSON.parse,
        function: ({ a, b }) => String(a + b),
      },
    },
  ],
});
found.agent = await runner.finalContent();
const vectors = await client.embeddings.create({ model: "vectors", input: ["a"] });
found.vectors = vectors.data[0].embedding.length;
const response = await client.responses.create({ model: "chat", input: "hello" });
found.response = response.output_text;
try {
  await client.chat.completions.create({ model: "nobody", messages });
} catch (error) {
  found.unknown = [error.constructor.name, error.code];
}
const claude = new Anthropic({ baseURL: url, apiKey: "none", maxRetries: 0 });
const said = await claude.messages.create({ model: "chat", max_tokens: 64, messages });
found.anthropic = said.content[0].text;
console.log(JSON.stringify(found));
