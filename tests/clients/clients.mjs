// What the JavaScript clients make of an artifact. usage: node clients.mjs CLIENT FOLDER NAME REQUEST
//
// FOLDER/NAME is the artifact; REQUEST is JSON: {"prompts": [[int]], "steps": int} or {"texts": [string]}.
// Prints one line of JSON. Prompts of different lengths are padded on the left.
import { readdirSync } from "node:fs";
import { AutoModelForCausalLM, env, pipeline, Tensor as HubTensor } from "@huggingface/transformers";
import { InferenceSession, Tensor } from "onnxruntime-node";

const [client, folder, name, json] = process.argv.slice(2);
const request = JSON.parse(json);
env.allowRemoteModels = false;
env.localModelPath = folder;

const length = Math.max(...(request.prompts ?? []).map((prompt) => prompt.length));
const padded = (fill, one) => request.prompts.flatMap((p) => [...Array(length - p.length).fill(fill), ...p.map(one)]);

// The tokens that follow each prompt, chosen greedily by transformers.js's own generate.
async function transformers() {
  const model = await AutoModelForCausalLM.from_pretrained(name);
  const dims = [request.prompts.length, length];
  const output = await model.generate({
    inputs: new HubTensor("int64", BigInt64Array.from(padded(0, (id) => id), BigInt), dims),
    attention_mask: new HubTensor("int64", BigInt64Array.from(padded(0, () => 1), BigInt), dims),
    max_new_tokens: request.steps,
    do_sample: false,
  });
  return output.tolist().map((row) => row.slice(length).map(Number));
}

// The same by hand, with onnxruntime-node alone.
async function onnxruntime() {
  const file = readdirSync(`${folder}/${name}/onnx`).find((file) => file.endsWith(".onnx"));
  const session = await InferenceSession.create(`${folder}/${name}/onnx/${file}`);
  const rows = request.prompts.length;
  const int64 = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [rows, values.length / rows]);
  let mask = request.prompts.map((p) => [...Array(length - p.length).fill(0), ...p.map(() => 1)]);
  let past = {};
  for (const { name, shape } of session.inputMetadata) {
    if (name.startsWith("past_key_values.")) past[name] = new Tensor("float32", [], [rows, shape[1], 0, shape[3]]);
  }
  let fresh = padded(0, (id) => id);
  const answers = request.prompts.map(() => []);
  for (let step = 0; step < request.steps; ++step) {
    const feeds = { input_ids: int64(fresh), attention_mask: int64(mask.flat()), ...past };
    const { logits, ...present } = await session.run(feeds);
    past = Object.fromEntries(Object.entries(present).map(([n, x]) => [n.replace("present", "past_key_values"), x]));
    const [, positions, vocabulary] = logits.dims;
    fresh = answers.map((answer, row) => {
      const last = logits.data.subarray(((row + 1) * positions - 1) * vocabulary, (row + 1) * positions * vocabulary);
      answer.push(last.reduce((best, value, i) => (value > last[best] ? i : best), 0));
      return answer.at(-1);
    });
    mask = mask.map((row) => [...row, 1]);
  }
  return answers;
}

// Mean-pooled, normalized sentence embeddings.
async function embed() {
  const extract = await pipeline("feature-extraction", name);
  return (await extract(request.texts, { pooling: "mean", normalize: true })).tolist();
}

console.log(JSON.stringify(await { transformers, onnxruntime, embed }[client]()));
