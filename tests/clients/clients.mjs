// What the JavaScript clients make of an artifact. usage: node clients.mjs CLIENT FOLDER NAME REQUEST
//
// FOLDER/NAME is the artifact; REQUEST is JSON, or @FILE with it, see each client. Prints one line of JSON.
// Prompts of different lengths are padded on the left.
import { readdirSync, readFileSync } from "node:fs";
import * as hub from "@huggingface/transformers";
import { InferenceSession, Tensor } from "onnxruntime-node";

const [client, folder, name, json] = process.argv.slice(2);
const request = JSON.parse(json.startsWith("@") ? readFileSync(json.slice(1), "utf8") : json);
hub.env.allowRemoteModels = false;
hub.env.localModelPath = folder;

const length = Math.max(...(request.prompts ?? []).map((prompt) => prompt.length));
const padded = (fill, one) => request.prompts.flatMap((p) => [...Array(length - p.length).fill(fill), ...p.map(one)]);

// {"prompts": [[int]], "steps": int} -> the tokens after each prompt, chosen greedily by transformers.js's own generate.
async function transformers() {
  const model = await hub.AutoModelForCausalLM.from_pretrained(name);
  const dims = [request.prompts.length, length];
  const output = await model.generate({
    inputs: new hub.Tensor("int64", BigInt64Array.from(padded(0, (id) => id), BigInt), dims),
    attention_mask: new hub.Tensor("int64", BigInt64Array.from(padded(0, () => 1), BigInt), dims),
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

// {"texts": [string]} -> mean-pooled, normalized sentence embeddings.
async function embed() {
  const extract = await hub.pipeline("feature-extraction", name);
  return (await extract(request.texts, { pooling: "mean", normalize: true })).tolist();
}

const numbers = (tensor) => tensor.tolist().map((row) => row.map(Number));

// {"ids": [[int]], "mask": [[int]], "steps": int} -> what an encoder-decoder writes, its start token included.
async function translate() {
  const model = await hub.AutoModelForSeq2SeqLM.from_pretrained(name);
  const int64 = (rows) => new hub.Tensor("int64", BigInt64Array.from(rows.flat(), BigInt), [rows.length, rows[0].length]);
  const feeds = { inputs: int64(request.ids), attention_mask: int64(request.mask) };
  return numbers(await model.generate({ ...feeds, max_new_tokens: request.steps, do_sample: false, num_beams: 1 }));
}

// {"waveform": [number], "steps": int} -> the tokens of a speech recogniser, through its own feature extractor.
async function transcribe() {
  const extractor = await hub.AutoFeatureExtractor.from_pretrained(name);
  const model = await hub.AutoModelForSpeechSeq2Seq.from_pretrained(name);
  const { input_features } = await extractor(Float32Array.from(request.waveform));
  return numbers(await model.generate({ inputs: input_features, max_new_tokens: request.steps, do_sample: false }));
}

// {"feeds": {name: [dims, dtype, [number]]}} -> {output: [number]} of the class that config.json names.
async function forward() {
  const { architectures } = await hub.AutoConfig.from_pretrained(name);
  const model = await hub[architectures[0]].from_pretrained(name);
  const typed = (dtype, values) => (dtype === "int64" ? BigInt64Array.from(values, BigInt) : Float32Array.from(values));
  const feeds = Object.entries(request.feeds).map(([n, [dims, dtype, values]]) => [
    n,
    new hub.Tensor(dtype, typed(dtype, values), dims),
  ]);
  const outputs = await model(Object.fromEntries(feeds));
  return Object.fromEntries(Object.entries(outputs).map(([n, tensor]) => [n, Array.from(tensor.data)]));
}

const clients = { transformers, onnxruntime, embed, translate, transcribe, forward };
console.log(JSON.stringify(await clients[client]()));
