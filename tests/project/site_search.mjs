// Asks the built site's own search, as the browser's worker runs it: `node site_search.mjs SITE`
// reads queries as a JSON list and prints for each the places found, best first.
import { readFileSync, readdirSync } from "node:fs"
import { join } from "node:path"
import vm from "node:vm"

const site = process.argv[2]
const folder = join(site, "assets/javascripts/workers")
const script = readdirSync(folder).find((name) => /^search\..*\.min\.js$/.test(name))
const index = JSON.parse(readFileSync(join(site, "search/search_index.json"), "utf8"))
const queries = JSON.parse(readFileSync(0, "utf8"))

const answers = []
let handler = null
const world = vm.createContext({
  addEventListener: (kind, found) => { if (kind === "message") handler = found },
  postMessage: (message) => answers.push(message),
  console,
})
world.self = world
vm.runInContext(readFileSync(join(folder, script), "utf8"), world)

const ask = async (type, data) => {
  answers.length = 0
  await handler({ data: { type, data } })
  return answers.at(-1)
}
await ask(0, { ...index, options: { suggest: false } })
const found = []
for (const query of queries) {
  const reply = await ask(2, query)
  // A hit is a page with its best sections: what a reader sees, in that order.
  found.push((reply.data.items ?? []).map((page) => page.map((part) => part.location)))
}
console.log(JSON.stringify(found))
