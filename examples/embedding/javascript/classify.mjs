// Classify texts in Node.js, from a bundle as `distill export` wrote it.
//
// npm install, then: node classify.mjs BUNDLE [q8|fp32] < texts.txt
import fs from "node:fs";
import path from "node:path";

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
const manifest = path.join(folder, "distill.json");
if (fs.existsSync(manifest) && JSON.parse(fs.readFileSync(manifest, "utf8")).data?.columns?.text_pair)
  fail(`${bundle}: was trained on pairs of texts; this program gives single ones`);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder);

// q8 is onnx/model_quantized.onnx, fp32 is onnx/model.onnx.
const classify = await pipeline("text-classification", path.basename(folder), { dtype, device: "cpu" }).catch(
  (error) => fail(`${bundle}: name a folder that \`distill export --int8\` wrote (${error.message})`),
);

// A line ends with a line feed alone, in the other languages too.
async function* lines(stream) {
  let rest = "";
  for await (const part of stream.setEncoding("utf8")) {
    const found = (rest + part).split("\n");
    rest = found.pop();
    yield* found;
  }
  if (rest) yield rest;
}

for await (const text of lines(process.stdin)) {
  // One text at a time: INT8 answers then do not depend on the texts beside them.
  const answers = await classify(text.replace(/\r$/, ""), { top_k: null });
  console.log(JSON.stringify(answers));
}
