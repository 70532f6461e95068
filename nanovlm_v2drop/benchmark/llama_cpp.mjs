// Runs a GGUF file in llama.cpp. Each line on stdin is a request in JSON; its answer is a line in JSON on stdout.
//
// node llama_cpp.mjs FOLDER MODEL PROMPT_TOKENS MOST_DECODED_TOKENS THREADS, where FOLDER holds node_modules.
import { createInterface } from "node:readline";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const [folder, modelPath, ...numbers] = process.argv.slice(2);
const [promptTokens, decodedTokens, threads] = numbers.map(Number);
const library = pathToFileURL(join(folder, "node_modules", "node-llama-cpp", "dist", "index.js"));
const { getLlama } = await import(library);

const logger = (level, message) => process.stderr.write(`${level}: ${message}\n`);
const llama = await getLlama({ gpu: false, build: "never", skipDownload: true, maxThreads: threads, logger });
const model = await llama.loadModel({ modelPath });
const contextSize = promptTokens + decodedTokens + 1;
const context = await model.createContext({ contextSize, batchSize: promptTokens, threads });
const sequence = context.getSequence();
const prompt = Array.from({ length: promptTokens }, (_, index) => 3 + (index % 256)); // the tokens of the 256 bytes

async function prefill() {
    await sequence.clearHistory();
    await sequence.evaluateWithoutGeneratingNewTokens(prompt);
}

async function decode(steps) {
    let left = steps;
    for await (const _ of sequence.evaluate([prompt[0]], { temperature: 0, yieldEogToken: true })) {
        left -= 1;
        if (left === 0) break;
    }
    await sequence.eraseContextTokenRanges([{ start: promptTokens, end: sequence.nextTokenIndex }]);
}

const answer = (content) => process.stdout.write(`${JSON.stringify(content)}\n`);
answer({ system: llama.systemInfo });
for await (const line of createInterface({ input: process.stdin })) {
    const request = JSON.parse(line);
    if (request.action === "prefill") await prefill();
    else await decode(request.steps);
    answer({ tokens: sequence.nextTokenIndex });
}
process.exit(0);
