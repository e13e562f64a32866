// The page of `qadeploy label`: one row at a time; calls to the server return the row to show next.
// The selected answer is kept in UTF-16 units, as the DOM counts; the server sends and receives code points.

import { $, cut, length, make, number, percent, plural } from "/static/tools.js";

const TAB = "qadeploy-label-tab";
const FAR = 10; // words
const NEAR = 200; // UTF-16 units within which the neighbouring character is searched
const page = Object.fromEntries(
  ["ask", "model", "count", "source", "reading", "asked", "question", "problem", "answer", "accept", "none", "skip", "undo", "counter", "estimate"].map((id) => [id, $(id)]),
);
const token = location.hash.slice(1);
const tab = sessionStorage.getItem(TAB) ?? crypto.randomUUID();
sessionStorage.setItem(TAB, tab);

const state = {
  row: null, documents: false,
  proposal: null, // the model's answer as a choice
  choice: null, // {start, end} in UTF-16 units, {none: true}, or null: nothing is selected yet
  words: null, // where the words of the text begin and end, once they are needed
};

// ---------------------------------------------------------------- the server

async function call(name, body) {
  let response;
  try {
    response = await fetch(`/v1/label/${name}`, {
      method: "POST", cache: "no-store", body: JSON.stringify({ tab, ...body }),
      headers: { "Content-Type": "application/json", Authorization: `Bearer ${token}` },
    });
  } catch {
    throw new Error("The server cannot be reached, so nothing was saved. Start qadeploy label again and open the address that it prints.");
  }
  const told = await response.json().catch(() => ({}));
  if (response.ok) return told;
  const reason = told.error?.message ?? `the server returned status ${response.status}`;
  const words = response.status === 401 ? "Open the whole address that qadeploy label printed, including the part after #." : reason[0].toUpperCase() + reason.slice(1) + ".";
  throw Object.assign(new Error(words), { status: response.status });
}

/** Runs one call at a time, so that a key that is pressed twice decides one row. */
async function once(work) {
  if (page.ask.ariaBusy === "true") return;
  page.ask.ariaBusy = "true";
  page.problem.replaceChildren();
  try {
    await work();
  } catch (error) {
    if (error.status === 409 && !state.documents) show(await call("show").catch(() => { throw error; }));
    page.problem.textContent = error.message;
  } finally {
    page.ask.ariaBusy = "false";
  }
}

const next = (name, body) => once(async () => show(await call(name, body)));

function decide(choice) {
  if (!state.row) return;
  if (!choice) {
    page.problem.textContent = "Nothing is selected yet: select the answer, or press N if it is not in the text.";
    return;
  }
  const { context, key } = state.row;
  const [start, end] = choice.none ? [null, null] : trimmed(choice).map((unit) => length(context.slice(0, unit)));
  next("decide", { key, question: page.question.value, start, end });
}

const ask = () => once(async () => {
  const { proposal } = await call("ask", { key: state.row.key, question: page.question.value });
  state.row.proposal = proposal;
  state.proposal = state.choice = inUnits(state.row.context, proposal);
  mark();
  page.reading.focus({ preventScroll: true });
});

// ---------------------------------------------------------------- what is shown

function inUnits(context, answer) {
  if (!answer) return null;
  if (!answer.text) return { none: true };
  const [before, inside] = cut(context, answer.start, answer.end);
  return { start: before.length, end: before.length + inside.length };
}

function show(told) {
  const { row, documents } = told;
  const again = row && row.key === state.row?.key;
  Object.assign(state, { row, documents, words: again ? state.words : null });
  state.proposal = row && inUnits(row.context, row.proposal);
  state.choice = state.proposal;
  page.model.textContent = `annotator: ${told.annotator}`;
  tellProgress(told);
  for (const button of [page.accept, page.none, page.skip]) button.disabled = !row;
  page.skip.firstElementChild.textContent = documents ? "Next passage" : "Skip";
  page.question.hidden = !documents || !row;
  page.asked.hidden = documents;
  for (const element of document.querySelectorAll(".typed")) element.hidden = !documents;
  page.asked.textContent = row?.question ?? "";
  page.question.value = "";
  page.count.textContent = row ? plural(length(row.context), "character") : "";
  page.source.textContent = row ? [row.document, row.place].filter(Boolean).join(", ") : "";
  page.source.hidden = !page.source.textContent;
  const undone = row?.undone;
  if (undone) {
    page.question.value = documents ? undone.question : "";
    const [start, end] = undone.span ?? [0, 0];
    state.choice = inUnits(row.context, { text: undone.span && "given", start, end });
  }
  if (!row) page.reading.textContent = documents ? "You have seen all passages." : "All rows are decided.";
  mark();
  if (documents && row && !undone) page.question.focus({ preventScroll: true });
  else page.reading.focus({ preventScroll: true });
  if (!again) page.reading.scrollTop = 0;
  page.reading.querySelector("mark")?.scrollIntoView({ block: "nearest" });
}

function mark() {
  const { row, choice } = state;
  if (!row) {
    page.answer.replaceChildren();
    return;
  }
  const text = row.context;
  if (choice && !choice.none) {
    page.reading.replaceChildren(text.slice(0, choice.start), make("mark", { text: text.slice(choice.start, choice.end) }), text.slice(choice.end));
  } else {
    page.reading.replaceChildren(text);
  }
  const same = choice && state.proposal && ["start", "end", "none"].every((name) => choice[name] === state.proposal[name]);
  const whose = same ? ` (the model, ${percent(row.proposal.score)})` : " (your selection)";
  const words = choice?.none ? make("em", { text: "Not in the text" }) : choice && make("bdi", { text: text.slice(choice.start, choice.end) });
  page.answer.replaceChildren(...(words ? [words, make("span", { class: "note", text: whose })] : [make("span", { class: "note", text: "No answer is selected." })]));
  page.reading.querySelector("mark")?.scrollIntoView({ block: "nearest" });
}

function tellProgress({ done, left, documents, estimate }) {
  page.counter.textContent = `${number(done)} done, ${documents ? plural(left, "passage") : plural(left, "row")} left`;
  const basis = documents ? "question that you asked it" : "row that was drawn at random";
  const on = documents ? "questions that you asked it" : "rows drawn at random";
  const why = documents ? "" : " Every fifth row is drawn at random; only those count, because the others are shown least certain first. Skipped rows do not count.";
  const words = estimate.total
    ? `The model is right on ${Math.round(estimate.exact_match)} % (exact match; 95 % interval ${estimate.interval.map(Math.round).join(" to ")} %), on ${number(estimate.total)} ${estimate.total === 1 ? basis : on}.`
    : `No estimate of the model yet: it begins with the first ${basis}.`;
  page.estimate.textContent = words + why;
}

// ---------------------------------------------------------------- selecting

/** The start and end of a choice without the white space around it. */
function trimmed({ start, end }) {
  const text = state.row.context;
  while (start < end && /\s/.test(text[start])) start += 1;
  while (end > start && /\s/.test(text[end - 1])) end -= 1;
  return [start, end];
}

function choose(start, end) {
  const text = state.row.context;
  // Never split a surrogate pair.
  if (/[\udc00-\udfff]/.test(text[start] ?? "")) start -= 1;
  if (/[\udc00-\udfff]/.test(text[end] ?? "")) end += 1;
  [start, end] = trimmed({ start, end });
  if (start === end) return;
  state.choice = { start, end };
  page.problem.replaceChildren();
  mark();
}

function takeSelection() {
  const selection = getSelection();
  if (!state.row || selection.isCollapsed || !selection.rangeCount) return;
  const range = selection.getRangeAt(0).cloneRange();
  if (!range.intersectsNode(page.reading)) return;
  const whole = document.createRange();
  whole.selectNodeContents(page.reading);
  if (range.compareBoundaryPoints(Range.START_TO_START, whole) < 0) range.setStart(whole.startContainer, whole.startOffset);
  if (range.compareBoundaryPoints(Range.END_TO_END, whole) > 0) range.setEnd(whole.endContainer, whole.endOffset);
  whole.setEnd(range.startContainer, range.startOffset);
  const start = whole.toString().length;
  selection.removeAllRanges();
  choose(start, start + range.toString().length);
}

const segments = (granularity, text) => [...new Intl.Segmenter(undefined, { granularity }).segment(text)];

function words() {
  state.words ??= segments("word", state.row.context).filter((part) => part.isWordLike).map(({ index, segment }) => [index, index + segment.length]);
  return state.words;
}

/** Selects the word that is `by` words after the current one, or before it if negative. */
function step(by) {
  const all = words();
  if (!all.length) return;
  const { choice } = state;
  const at = choice && !choice.none ? all.findIndex(([, end]) => end > choice.start) : by > 0 ? -1 : all.length;
  choose(...all[Math.min(all.length - 1, Math.max(0, (at < 0 && by < 0 ? all.length : at) + by))]);
}

/** Moves the end of the answer by a word, but not before the end of its first word. */
function stretch(by) {
  const { choice } = state;
  if (!choice || choice.none) return step(by);
  const all = words();
  const first = all.findIndex(([, end]) => end > choice.start);
  const last = all.findLastIndex(([start]) => start < choice.end);
  const end = all[Math.min(all.length - 1, Math.max(first, last + by))]?.[1];
  if (end > choice.start) choose(choice.start, end);
}

/** Moves the end or the start of the answer by a grapheme: an emoji, or a letter with its marks, is one. */
function nudge(side, by) {
  const { choice } = state;
  if (!choice || choice.none) return;
  const at = choice[side];
  const text = state.row.context;
  const near = by > 0 ? text.slice(at, at + NEAR) : text.slice(Math.max(0, at - NEAR), at);
  const found = segments("grapheme", near).at(by > 0 ? 0 : -1);
  if (!found) return;
  const moved = { ...choice, [side]: at + by * found.segment.length };
  if (moved.start >= moved.end) return;
  state.choice = moved; // may end in a space: the next step reaches the character after it
  mark();
}

// ---------------------------------------------------------------- keys and buttons

const skip = () => state.row && next("skip", { key: state.row.key });
const undo = () => next("undo", {});
const deeds = { Enter: () => decide(state.choice), n: () => decide({ none: true }), s: skip, u: undo, q: () => state.documents && page.question.focus() };

function arrow(event) {
  const backwards = getComputedStyle(page.reading).direction === "rtl" ? "ArrowRight" : "ArrowLeft";
  const by = event.key === backwards || event.key === "ArrowUp" ? -1 : 1;
  if (event.key === "ArrowUp" || event.key === "ArrowDown") step(by * FAR);
  else if (!event.shiftKey) step(by);
  else if (event.ctrlKey) nudge("end", by);
  else if (event.altKey) nudge("start", by);
  else stretch(by);
}

document.addEventListener("keydown", (event) => {
  if (event.isComposing || event.metaKey) return;
  if (event.target === page.question) {
    if (event.key === "Escape") page.reading.focus();
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      ask();
    }
    return;
  }
  if (event.target.closest("button") && event.key === "Enter") return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (/^Arrow/.test(key) && state.row) arrow(event);
  else if (key === "Escape" && state.row) {
    state.choice = state.proposal;
    mark();
  } else if (Object.hasOwn(deeds, key) && !event.ctrlKey && !event.altKey) {
    if (!event.repeat) deeds[key]();
  } else return;
  event.preventDefault();
});
document.addEventListener("pointerup", () => setTimeout(takeSelection)); // a click clears an older selection only after this
page.accept.addEventListener("click", () => decide(state.choice));
page.none.addEventListener("click", () => decide({ none: true }));
page.skip.addEventListener("click", skip);
page.undo.addEventListener("click", undo);
page.question.addEventListener("input", () => {
  if (state.choice === state.proposal) state.choice = null;
  state.proposal = null; // it was the answer to another question
  mark();
});

next("show", {});
