// Classify texts in Node.js, from a bundle as `distill export` wrote it.
//
// npm install, then: node classify.mjs BUNDLE [q8|fp32] < texts.txt
import path from "node:path";
import readline from "node:readline";
import { env, pipeline } from "@huggingface/transformers";

const [bundle, dtype = "q8"] = process.argv.slice(2);
if (!bundle) {
  console.error("usage: node classify.mjs BUNDLE [q8|fp32] < texts.txt");
  process.exit(2);
}
const folder = path.resolve(bundle);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder);

// q8 is onnx/model_quantized.onnx, fp32 is onnx/model.onnx.
const classify = await pipeline("text-classification", path.basename(folder), { dtype, device: "cpu" });

for await (const text of readline.createInterface({ input: process.stdin })) {
  // One text at a time: INT8 answers then do not depend on the texts beside them.
  const answers = await classify(text, { top_k: null });
  console.log(JSON.stringify(answers));
}
