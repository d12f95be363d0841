// llama.cpp with its GGUF mapped: GGUF BUDGET_BYTES TOKENS PROMPT_IDS.
//
// node-llama-cpp brings llama.cpp built for each kind of processor, so that nothing is compiled here.
// Its folder of modules is in PEERS_NODE_MODULES. Prints what `token_times.py` prints.

import {readFileSync} from "node:fs";
import {join} from "node:path";

const [gguf, , tokens, prompt] = process.argv.slice(2);
const folder = join(process.env.PEERS_NODE_MODULES, "node-llama-cpp");
const {getLlama} = await import(join(folder, "dist", "index.js"));
const {version} = JSON.parse(readFileSync(join(folder, "package.json")));
const readBytes = () => Number(/^read_bytes: (\d+)$/m.exec(readFileSync("/proc/self/io"))[1]);

const llama = await getLlama({gpu: false, build: "never", progressLogs: false, logLevel: "error"});
const model = await llama.loadModel({modelPath: gguf, useMmap: true, gpuLayers: 0});
const ids = JSON.parse(prompt);
const context = await model.createContext({contextSize: ids.length + Number(tokens) + 1});
const found = [];
const marks = [];
const startedMs = performance.now();
for await (const token of context.getSequence().evaluate(ids, {temperature: 0, yieldEogToken: true})) {
    found.push(token);
    marks.push({ms: performance.now(), read: readBytes()});
    if (found.length >= Number(tokens))
        break;
}
const decoded = marks.length - 1;
process.stdout.write(JSON.stringify({
    version: `llama.cpp ${llama.llamaCppRelease.release}, node-llama-cpp ${version}`,
    token_ids: found,
    prefill_s: (marks[0].ms - startedMs) / 1000,
    token_s: marks.slice(1).map(({ms}, index) => (ms - marks[index].ms) / 1000),
    read_bytes_per_token: (marks[decoded].read - marks[0].read) / decoded
}) + "\n", () => process.exit(0));
