// Answers questions about a text in the browser, with the model of this folder.
//
//   import { Answerer } from "./answerer.js";
//   const answerer = await Answerer.load();
//   await answerer.answer("Who keeps the lamp?", "Mungo Strand keeps the lamp.");
//   // { text: "Mungo Strand", score: 0.9, start: 0, end: 12, utf16: { start: 0, end: 12 } }

import * as ort from "./onnxruntime-web.js";
import { cut } from "./tools.js";

ort.env.wasm.proxy = true; // in a worker, so that the page stays responsive

export class Answerer {
  #session;

  constructor(session, manifest) {
    this.#session = session;
    this.manifest = manifest;
  }

  /** Loads the model. Throws an Error if this browser cannot run it. */
  static async load() {
    if (typeof WebAssembly !== "object") throw new Error("This browser has no WebAssembly, or it is turned off. The model needs it.");
    const manifest = await (await get("manifest.json", { cache: "no-cache" })).json();
    const { sha256 } = manifest.files["model.onnx"];
    const model = await (await get(`model.onnx?${sha256}`)).arrayBuffer(); // never an older one from the browser's cache
    return new Answerer(await ort.InferenceSession.create(model), manifest);
  }

  /** Whether the model was trained to say that a text has no answer. */
  get knowsNoAnswer() {
    return this.manifest.settings.null_threshold !== null;
  }

  /**
   * The best answer: { text, score, start, end, utf16: { start, end } }, as the Answerer in Python gives it.
   *
   * start and end count code points; utf16 has the same place for JavaScript: context.slice(utf16.start, utf16.end) is text.
   * If allowNoAnswer is true (the default if knowsNoAnswer) and the context has no answer, text is empty, all places are 0,
   * and score is the probability of no answer.
   */
  async answer(question, context, { allowNoAnswer = this.knowsNoAnswer } = {}) {
    const out = await this.#session.run({ question: tensor("question", question), context: tensor("context", context) });
    const [score, start, end, difference] = ["score", "start", "end", "null_difference"].map((name) => Number(out[name].data[0]));
    if (Number.isNaN(score)) throw new Error("The model's results are not numbers.");
    if (start < 0) throw new RangeError("The question is too long, or nothing in the text can be an answer.");
    const { temperature, null_threshold: threshold } = this.manifest.settings;
    const odds = allowNoAnswer ? score * Math.exp(difference / temperature) : 0; // of no answer against all answers
    if (allowNoAnswer && difference > (threshold ?? 0)) {
      return { text: "", score: 1 / (1 + 1 / odds), start: 0, end: 0, utf16: { start: 0, end: 0 } };
    }
    const [before, text] = cut(context, start, end);
    return { text, score: score / (1 + odds), start, end, utf16: { start: before.length, end: before.length + text.length } };
  }
}

async function get(name, options) {
  const url = new URL(name, import.meta.url);
  const response = await fetch(url, options);
  if (!response.ok) throw new Error(`${url.pathname}: the web server returned status ${response.status}.`);
  return response;
}

function tensor(name, text) {
  if (!text.trim()) throw new RangeError(`The ${name} is empty.`);
  // The runtime accepts neither lone surrogates nor U+0000. The tokenizer skips the replacement, and offsets stay the same.
  return new ort.Tensor("string", [text.toWellFormed().replaceAll("\0", "\ufffd")], [1]);
}
