// Answers from a bundle of `qadeploy export --strings-in-graph` (or --spans-in-graph), with ONNX Runtime for Node alone.
//
//   node answer.mjs bundles/faq-text "Who keeps the lamp?" "Mungo Strand keeps the lamp."
//   node answer.mjs bundles/faq-text < questions.jsonl      one {"question": ..., "context": ...} per line, or for a
//   node answer.mjs bundles/faq-spans < windows.jsonl       bundle NAME-spans {"input_ids": [...], "context_mask": [...], ...}
//
// Prints one JSON object per line.

import { readFileSync } from "node:fs";
import { join } from "node:path";
import { createInterface } from "node:readline";
import ort from "onnxruntime-node";

const [folder, question, context] = process.argv.slice(2);
if (!folder || (question !== undefined && context === undefined)) {
  console.error("usage: node answer.mjs BUNDLE [QUESTION CONTEXT]");
  process.exit(2);
}
const manifest = JSON.parse(readFileSync(join(folder, "manifest.json"), "utf8"));
const kind = manifest.in_graph?.kind;
if (kind !== "text" && kind !== "spans") {
  console.error(`${folder}: has no answers in its graph: export it with qadeploy export --strings-in-graph`);
  process.exit(2);
}
const session = await ort.InferenceSession.create(join(folder, "model.onnx"));

async function fromText({ question, context }) {
  const text = (value) => new ort.Tensor("string", [value], [1]);
  const out = await session.run({ question: text(question), context: text(context) });
  const [start, end] = [Number(out.start.data[0]), Number(out.end.data[0])];
  return { answer: out.answer.data[0], score: out.score.data[0], start, end };
}

// One window: the ids of question and context with their special tokens, unpadded.
async function fromWindow(window) {
  const feeds = {};
  for (const name of session.inputNames) {
    const values = BigInt64Array.from(window[name], BigInt);
    feeds[name] = new ort.Tensor("int64", values, [1, values.length]);
  }
  const out = await session.run(feeds);
  const [temperature, log_sum] = [manifest.in_graph.temperature, out.log_sum.data[0]];
  const spans = [];
  out.span_starts.data.forEach((start, i) => {
    if (start >= 0n) {
      const logit = out.span_scores.data[i];
      const score = Math.exp(logit / temperature - log_sum); // in this window
      spans.push({ start: Number(start), end: Number(out.span_ends.data[i]), logit, score });
    }
  });
  return { spans, log_sum, null_score: out.null_scores.data[0] };
}

const answer = kind === "text" ? fromText : fromWindow;
if (question !== undefined) {
  console.log(JSON.stringify(await answer({ question, context })));
} else {
  for await (const line of createInterface({ input: process.stdin })) {
    if (line.trim()) console.log(JSON.stringify(await answer(JSON.parse(line))));
  }
}
