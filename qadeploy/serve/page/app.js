// The page of `qadeploy serve`: asks POST /v1/answer and highlights the answers in the text, or in the passages of the corpus.

import { $, cut, length, make, number, percent, plural } from "/static/tools.js";

const ANSWERS = 5;
const AROUND = 5000; // characters on each side of an answer from the corpus: the maximum, which shows its whole passage
const TOKEN = "qadeploy-token";
const page = Object.fromEntries(
  ["model", "unlock", "token", "ask", "count", "example", "edit", "source", "context", "reading", "question", "suggestions", "null-choice",
    "allow-null", "go", "problem", "said", "result", "answers", "facts", "trace", "trace-body"].map((id) => [id, $(id)]),
);

const state = {
  limits: {}, knowsNull: false, corpus: null, // facts about the server
  examples: [], own: "", // own: the user's text, kept while an example is shown
  shown: null, // the shown result: {context, question, answers, trace, chosen}; without a context, it is from the corpus
  asking: null, // the AbortController of the running request
  again: 0, // the timer that is set after a 429
};

const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`;

// ---------------------------------------------------------------- the server

class Problem extends Error {
  constructor(words, { status = 0, id = "", wait = 0 } = {}) {
    super(words);
    Object.assign(this, { status, id, wait });
  }
}

async function call(path, body, signal) {
  const headers = {};
  const token = sessionStorage.getItem(TOKEN);
  if (token) headers.Authorization = `Bearer ${token}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server cannot be reached. Check that it is running and that you are connected.");
  }
  let answer = null;
  try {
    answer = await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
  }
  if (!response.ok) throw problem(response, answer);
  if (answer === null) throw new Problem("The server sent an invalid response. Ask again.");
  return answer;
}

function problem(response, answer) {
  const { status } = response;
  const told = answer?.error ?? {};
  const found = { status, id: response.headers.get("X-Request-Id") ?? "", wait: Number(response.headers.get("Retry-After")) || 0 };
  const reason = told.message ? told.message[0].toUpperCase() + told.message.slice(1).replace(/\.?$/, ".") : "";
  const limit = told.limit ? ` The server accepts at most ${number(told.limit)} bytes.` : "";
  const words = {
    401: sessionStorage.getItem(TOKEN) ? "The server rejected this token." : "The server requires a token: enter it above.",
    408: "The text did not arrive in time. Ask again, or use a shorter text.",
    413: `The text is too long to send.${limit} Shorten it and ask again.`,
    422: reason || "The server cannot use this text or question.",
    429: `The server is busy. Ask again in ${plural(found.wait || 1, "second")}.`,
    500: `The server failed to answer. ${reason}`,
    503: "The server is shutting down. Ask again in a moment.",
    504: "There was no answer in time. Ask again, or use a shorter text.",
  };
  return new Problem(words[status] ?? `The server returned status ${status}. ${reason}`, found);
}

// ---------------------------------------------------------------- text and question

function countText() {
  const points = length(page.context.value);
  const limit = state.limits.max_context_chars ?? Infinity;
  const none = state.corpus ? plural(state.corpus.documents, "document") : "";
  page.count.textContent = points === 0 ? none : points > limit ? `${number(points)} characters, at most ${number(limit)}` : plural(points, "character");
  page.count.classList.toggle("over", points > limit);
}

/** Shows the text in its editable form; with `select`, the highlighted part is selected. */
function edit(select = false) {
  if (page.reading.hidden) return;
  const place = page.reading.scrollTop;
  page.reading.hidden = page.edit.hidden = page.source.hidden = true;
  page.context.hidden = false;
  page.context.scrollTop = place;
  if (!select) return;
  page.context.focus({ preventScroll: true });
  const answer = state.shown?.answers[state.shown.chosen];
  if (answer?.text && state.shown.context) {
    const [before, inside] = cut(state.shown.context, answer.start, answer.end);
    page.context.setSelectionRange(before.length, before.length + inside.length);
  }
}

function forget() {
  state.shown = null;
  page.result.hidden = page.trace.hidden = true;
  page.answers.replaceChildren();
  page.reading.replaceChildren();
  page.source.hidden = true;
  page["trace-body"].replaceChildren();
  page.said.textContent = "";
  page.problem.replaceChildren();
}

function pick(index) {
  const example = state.examples[index];
  edit();
  forget();
  page.context.value = example ? example.context : state.own;
  page.context.scrollTop = 0;
  page.question.value = example ? example.questions[0] : "";
  page.suggestions.replaceChildren(...(example?.questions ?? []).map((question) => make("button", { type: "button", text: question })));
  page.suggestions.hidden = !example;
  countText();
}

// ---------------------------------------------------------------- asking

async function ask() {
  const context = state.corpus && !page.context.value.trim() ? "" : page.context.value;
  const question = page.question.value;
  const needed = [[page.context, context, "There is no text yet: paste one or choose an example."], [page.question, question, "There is no question yet."]];
  for (const [field, text, words] of needed.slice(state.corpus ? 1 : 0)) {
    if (!text.trim()) {
      tell(new Problem(words));
      if (field === page.context) edit();
      field.focus();
      return;
    }
  }
  state.asking?.abort();
  const asking = (state.asking = new AbortController());
  clearTimeout(state.again);
  page.go.setAttribute("aria-busy", "true");
  page.problem.replaceChildren();
  const started = performance.now();
  try {
    const { answers, trace } = await call("/v1/answer", request(context, question, page.trace.open), asking.signal);
    show({ context, question, answers, trace, chosen: 0, milliseconds: performance.now() - started });
  } catch (error) {
    if (error.name !== "AbortError") {
      forget();
      page.reading.replaceChildren(context);
      tell(error);
    }
  } finally {
    if (state.asking === asking) {
      state.asking = null;
      page.go.removeAttribute("aria-busy");
    }
  }
}

function request(context, question, trace) {
  const text = context ? { context } : { snippet: AROUND };
  return { ...text, question, top_k: Math.min(ANSWERS, state.limits.max_top_k ?? ANSWERS), allow_no_answer: state.knowsNull && page["allow-null"].checked, trace };
}

function unlock() {
  sessionStorage.removeItem(TOKEN);
  page.unlock.hidden = false;
  page.token.focus();
}

function tell(error) {
  page.said.textContent = "";
  page.problem.replaceChildren(error.message);
  if (error.id) page.problem.append(make("small", { text: `request ${error.id}` }));
  if (error.status === 401) unlock();
  if (error.status === 429) {
    clearTimeout(state.again);
    state.again = setTimeout(() => page.problem.replaceChildren("The server was busy. You can ask again now."), 1000 * (error.wait || 1));
  }
}

// ---------------------------------------------------------------- answers

/** The source of an answer from the corpus: its document and, if there is one, the place in it. */
function from({ document: name, place }) {
  return [name, place].filter(Boolean).map((text) => make("span", { dir: "auto", text }));
}

function show(found) {
  const { answers, context, milliseconds } = (state.shown = found);
  const where = context ? "in this text" : "in these documents";
  page.answers.replaceChildren(
    ...answers.map((answer, index) => make("li", {}, make(
      "button", { type: "button", "aria-pressed": index === 0, "--width": `${(100 * answer.score).toFixed(2)}%` },
      answer.text ? make("bdi", { text: answer.text }) : make("bdi", { class: "none", text: `No answer ${where}` }),
      make("span", { class: "score", title: `score ${answer.score}`, text: percent(answer.score) }),
      ...(answer.document ? [make("span", { class: "from" }, ...from(answer))] : []),
      make("span", { class: "rule" }),
    ))),
  );
  page.facts.textContent = answers.length
    ? `${answers.length > 1 ? `Choose one to see it in ${context ? "the text" : "its document"}. ` : ""}Answered in ${number(Math.max(1, Math.round(milliseconds)))} ms.`
    : context ? "Nothing in this text can be an answer." : "No word of the question occurs in the documents.";
  page.result.hidden = false;
  page.trace.hidden = !answers.length && !context; // nothing was read
  const best = answers[0];
  const place = best?.document ? `, from ${[best.document, best.place].filter(Boolean).join(", ")}` : "";
  page.said.textContent = !best ? page.facts.textContent : best.text ? `Answer: ${best.text}, ${percent(best.score)}${place}` : `No answer ${where}, ${percent(best.score)}`;
  const focused = document.activeElement === page.context;
  const scrolled = page.context.hidden ? page.reading.scrollTop : page.context.scrollTop;
  page.context.hidden = true;
  page.reading.hidden = page.edit.hidden = false;
  page.reading.setAttribute("aria-label", `The ${context ? "text" : "passage"} with the answer highlighted`);
  page.reading.replaceChildren(context);
  page.reading.scrollTop = scrolled;
  if (focused) page.reading.focus({ preventScroll: true });
  choose(0);
  page.answers.firstElementChild?.scrollIntoView({ block: "nearest" });
  page["trace-body"].replaceChildren();
  if (page.trace.open) explain();
}

/** Highlights one of the answers in the text and scrolls to it, without moving the page. */
function choose(index) {
  const { answers, context } = state.shown;
  state.shown.chosen = index;
  [...page.answers.querySelectorAll("button")].forEach((button, i) => button.setAttribute("aria-pressed", i === index));
  const answer = answers[index];
  page.source.replaceChildren(...(answer?.document ? from(answer) : []));
  page.source.hidden = !answer?.document;
  if (!answer?.text) {
    page.reading.replaceChildren(context);
    return;
  }
  const { text, start } = context ? { text: context, start: 0 } : answer.snippet;
  const [before, inside, after] = cut(text, answer.start - start, answer.end - start);
  const mark = make("mark", { text: inside });
  page.reading.replaceChildren(before, mark, after);
  const sheet = page.reading.getBoundingClientRect();
  const box = mark.getBoundingClientRect();
  const margin = Math.min(sheet.height / 4, 80);
  if (box.top < sheet.top + margin || box.bottom > sheet.bottom - margin) {
    const smooth = matchMedia("(prefers-reduced-motion: no-preference)").matches;
    const top = page.reading.scrollTop + box.top - sheet.top - Math.max(margin, (sheet.height - box.height) / 2);
    page.reading.scrollTo({ top, behavior: smooth ? "smooth" : "auto" });
  }
}

// ---------------------------------------------------------------- the trace

async function explain() {
  const shown = state.shown;
  if (!shown) return;
  if (!shown.trace) {
    page["trace-body"].replaceChildren(make("p", { class: "note", text: "Loading the trace …" }));
    try {
      shown.trace = (await call("/v1/answer", request(shown.context, shown.question, true))).trace;
    } catch (error) {
      if (state.shown !== shown) return;
      page["trace-body"].replaceChildren(make("p", { class: "note", text: "The trace could not be loaded: close this and open it again." }));
      tell(error);
      return;
    }
  }
  if (state.shown !== shown) return;
  const { trace } = shown;
  const best = trace.candidates.find((candidate) => candidate.answer === 1);
  page["trace-body"].replaceChildren(numbers(trace), ...windows(trace, best), ...candidates(trace));
  reveal(page["trace-body"].querySelector(".tokens")); // now that it has a size
}

function numbers(trace) {
  const { settings } = trace;
  const facts = [
    ["Question", plural(trace.question_tokens.length, "token")],
    ["Text", plural(trace.context_tokens, "token")],
    ["Windows", `${number(trace.windows.length)} of at most ${number(settings.max_seq_len)} tokens`],
    ["Longest answer", plural(settings.max_answer_len, "token")],
    ["Temperature", settings.temperature.toFixed(3)],
    ["Null logit (no answer)", signed(trace.null_logit)],
    ["Null threshold", settings.null_threshold === null ? "none" : signed(settings.null_threshold)],
  ];
  return make("dl", { class: "numbers" }, ...facts.map(([name, value]) => make("div", {}, make("dt", { text: name }), make("dd", { text: value }))));
}

function windows(trace, best) {
  const title = make("h2", { text: "Where answers start and end" });
  const about = make("p", { class: "note", text: "The model gives each token two numbers (logits): how well it fits as the start and as the end of an answer. The deeper the colour, the higher the logit within this window." });
  const where = make("span", { role: "status" });
  const back = make("button", { type: "button", class: "quiet", text: "Previous window" });
  const on = make("button", { type: "button", class: "quiet", text: "Next window" });
  const body = make("div");
  let at = best ? best.window - 1 : 0;
  const draw = () => {
    const shown = trace.windows[at];
    const last = shown.context_offset + shown.context_length - 1;
    where.textContent = `Window ${at + 1} of ${trace.windows.length}: tokens ${number(shown.context_offset)} to ${number(last)} of the text`;
    back.setAttribute("aria-disabled", at === 0);
    on.setAttribute("aria-disabled", at === trace.windows.length - 1);
    body.replaceChildren(...heat(shown, best?.window === at + 1 ? best.tokens : null));
    reveal(body.querySelector(".tokens"));
  };
  const step = (by) => () => {
    const next = at + by;
    if (trace.windows[next]) {
      at = next;
      draw();
    }
  };
  back.addEventListener("click", step(-1));
  on.addEventListener("click", step(1));
  draw();
  return trace.windows.length > 1 ? [title, about, make("div", { class: "pager" }, back, where, on), body] : [title, about, body];
}

/** Scales logits to 0 to 1, squared because most are far below the few that matter. */
function scale(logits) {
  const low = Math.min(...logits);
  const range = Math.max(...logits) - low || 1;
  return logits.map((logit) => ((logit - low) / range) ** 2);
}

function heat(shown, span) {
  const rows = [["start", "Start", shown.start_logits], ["end", "End", shown.end_logits]].map(([kind, name, logits]) => {
    const best = logits.indexOf(Math.max(...logits));
    const label = `${name}: highest at “${shown.pieces[best]}”, ${signed(logits[best])}; lowest ${signed(Math.min(...logits))}`;
    const cells = scale(logits).map((value, i) => make("i", { "--heat": value.toFixed(3), title: `${shown.pieces[i]} ${signed(logits[i])}` }));
    return make("div", { class: `strip ${kind}` }, make("span", { text: name }), make("div", { class: "cells", role: "img", "aria-label": label }, ...cells));
  });
  const starts = scale(shown.start_logits);
  const ends = scale(shown.end_logits);
  const tokens = shown.pieces.map((piece, i) => make("span", {
    class: [shown.offsets[i] ? "" : "outside", span && i >= span[0] && i <= span[1] ? "chosen" : ""].join(" ").trim() || null,
    title: `token ${i}, id ${shown.input_ids[i]}: start ${signed(shown.start_logits[i])}, end ${signed(shown.end_logits[i])}`,
    "--s": starts[i].toFixed(3), "--e": ends[i].toFixed(3), text: piece,
  }));
  return [...rows, make("div", { class: "tokens", tabindex: "0", role: "group", "aria-label": "The tokens of this window" }, ...tokens)];
}

/** Scrolls a box of tokens to the chosen ones, without moving the page. */
function reveal(box) {
  const chosen = box.querySelector(".chosen");
  if (chosen) box.scrollTop += chosen.getBoundingClientRect().top - box.getBoundingClientRect().top - box.clientHeight / 3;
}

function candidates(trace) {
  const head = ["Window", "Tokens", "Logit", "Text", "Verdict"];
  const rows = trace.candidates.slice(0, 12).map((candidate) => make(
    "tr", { class: candidate.answer === null ? "lost" : null },
    make("td", { class: "number", text: candidate.window }),
    make("td", { class: "number", text: candidate.tokens.join("–") }),
    make("td", { class: "number", text: signed(candidate.logit) }),
    make("td", { class: "quote" }, make("bdi", { text: candidate.text || "—" })),
    make("td", { text: candidate.verdict }),
  ));
  return [
    make("h2", { text: "The strongest spans and their verdicts" }),
    make("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "The strongest spans" }, make(
      "table", {},
      make("thead", {}, make("tr", {}, ...head.map((name, i) => make("th", { scope: "col", class: i < 3 ? "number" : null, text: name })))),
      make("tbody", {}, ...rows),
    )),
  ];
}

// ---------------------------------------------------------------- start

async function meet() {
  const { name, hash, device, limits, manifest, corpus = null } = await call("/v1/model");
  const threshold = manifest.settings?.null_threshold;
  Object.assign(state, { limits, knowsNull: typeof threshold === "number", corpus });
  page.model.textContent = [name, manifest.precision, device].filter(Boolean).join(" · ");
  page.model.title = `bundle ${hash}`;
  page["null-choice"].hidden = !state.knowsNull;
  if (corpus) page.context.placeholder = `Leave this empty to ask ${plural(corpus.documents, "document")}, or paste a text.`;
  countText();
}

async function offer() {
  try {
    state.examples = await call("/static/examples.json");
  } catch {
    return; // the page works without examples
  }
  page.example.append(make("option", { value: -1, text: state.corpus ? "The documents, or your own text" : "Your own text" }), ...state.examples.map((example, index) => make("option", { value: index, text: example.title })));
  page.example.parentElement.hidden = false;
  if (!page.context.value && !page.question.value && !state.corpus) {
    page.example.value = 0;
    pick(0);
  } else page.example.value = -1; // after a reload the browser keeps the text
}

page.ask.addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
page.unlock.addEventListener("submit", async (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN, page.token.value.trim());
  page.problem.replaceChildren();
  try {
    await meet();
    if (state.corpus && page.example.value === "0" && !state.shown) {
      page.example.value = -1; // the example was shown before the documents were known
      page.example.selectedOptions[0].textContent = "The documents, or your own text";
      pick(-1);
    }
    page.unlock.hidden = true;
    page.token.value = "";
    page.question.focus();
  } catch (error) {
    tell(error);
  }
});
page.example.addEventListener("change", () => pick(Number(page.example.value)));
page.suggestions.addEventListener("click", (event) => {
  if (!event.target.matches("button")) return;
  page.question.value = event.target.textContent;
  ask();
});
page.answers.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) choose([...page.answers.querySelectorAll("button")].indexOf(button));
});
page.edit.addEventListener("click", () => edit(true));
page.context.addEventListener("input", () => {
  state.own = page.context.value;
  if (page.example.value !== "-1") page.example.value = -1;
  page.suggestions.hidden = true;
  forget();
  countText();
});
page.trace.addEventListener("toggle", () => {
  if (page.trace.open && !page["trace-body"].childElementCount) explain();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.isComposing || event.target === page.token) return;
  if (event.ctrlKey || event.metaKey || (event.target === page.question && !event.shiftKey)) {
    event.preventDefault();
    ask();
  }
});

meet().catch((error) => {
  if (error.status === 401 && !sessionStorage.getItem(TOKEN)) unlock(); // the form asks for the token
  else tell(error);
}).then(offer); // with documents, no example is shown at first
