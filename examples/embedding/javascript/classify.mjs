// Classify texts in Node.js, from a bundle as `distill export` wrote it.
//
// npm install, then: node classify.mjs BUNDLE [q8|fp32] < texts.txt
import path from "node:path";
import readline from "node:readline";

function fail(message, status = 1) {
  console.error(message);
  process.exit(status);
}

const [bundle, dtype = "q8"] = process.argv.slice(2);
if (!bundle || !["q8", "fp32"].includes(dtype)) fail("usage: node classify.mjs BUNDLE [q8|fp32] < texts.txt", 2);
const { env, pipeline } = await import("@huggingface/transformers").catch(() =>
  fail("transformers.js is not installed; run: npm install --ignore-scripts"),
);
const folder = path.resolve(bundle);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder);

// q8 is onnx/model_quantized.onnx, fp32 is onnx/model.onnx.
const classify = await pipeline("text-classification", path.basename(folder), { dtype, device: "cpu" }).catch(
  (error) => fail(`${bundle}: name a folder that \`distill export --int8\` wrote (${error.message})`),
);

for await (const text of readline.createInterface({ input: process.stdin })) {
  // One text at a time: INT8 answers then do not depend on the texts beside them.
  const answers = await classify(text, { top_k: null });
  console.log(JSON.stringify(answers));
}
