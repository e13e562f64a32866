// The page of a static site: asks the model in its folder and highlights the answer in the text.

import { $, length, make, number, percent, plural } from "./tools.js";

const page = Object.fromEntries(
  ["model", "file", "ask", "count", "edit", "context", "reading", "question", "null-choice", "allow-null", "go", "problem", "said", "result",
    "answers", "facts"].map((id) => [id, $(id)]),
);
let answerer = null;
let asked = 0; // the number of the last question; only its answer is shown

/** Removes the answer that is shown, and ignores one that is on its way. */
function forget() {
  asked += 1;
  page.go.removeAttribute("aria-busy");
  page.result.hidden = true;
  page.said.textContent = "";
  page.problem.replaceChildren();
}

function tell(words) {
  forget();
  edit();
  page.problem.replaceChildren(words);
}

/** Shows the text in its editable form. */
function edit() {
  page.reading.hidden = page.edit.hidden = true;
  page.context.hidden = false;
}

async function ask() {
  const [question, context] = [page.question.value, page.context.value];
  const empty = [[page.context, "There is no text yet: paste one."], [page.question, "There is no question yet."]].find(([field]) => !field.value.trim());
  if (empty) {
    tell(empty[1]);
    empty[0].focus();
    return;
  }
  forget();
  const turn = asked;
  page.go.setAttribute("aria-busy", "true");
  const started = performance.now();
  try {
    const answer = await answerer.answer(question, context, { allowNoAnswer: page["allow-null"].checked && answerer.knowsNoAnswer });
    if (turn === asked) show(answer, context, performance.now() - started);
  } catch (error) {
    if (turn === asked) tell(error.message);
  } finally {
    if (turn === asked) page.go.removeAttribute("aria-busy");
  }
}

function show({ text, score, start, end, utf16 }, context, milliseconds) {
  const none = "No answer in this text";
  page.answers.replaceChildren(make("li", {}, make(
    "button", { type: "button", "--width": `${(100 * score).toFixed(2)}%` },
    text ? make("bdi", { text }) : make("bdi", { class: "none", text: none }),
    make("span", { class: "score", title: `score ${score}`, text: percent(score) }),
    make("span", { class: "rule" }),
  )));
  const place = text ? `Characters ${number(start)} to ${number(end)}. ` : "";
  page.facts.textContent = `${place}Answered in ${number(Math.max(1, Math.round(milliseconds)))} ms.`;
  page.said.textContent = `${text ? `Answer: ${text}` : none}, ${percent(score)}`;
  page.result.hidden = page.reading.hidden = page.edit.hidden = false;
  page.context.hidden = true;
  page.reading.replaceChildren(context.slice(0, utf16.start), ...(text ? [make("mark", { text })] : []), context.slice(utf16.end));
  reveal();
}

function reveal() {
  page.reading.querySelector("mark")?.scrollIntoView({ block: "nearest" });
}

async function start() {
  page.file.remove();
  page.model.textContent = "Loading the model …";
  try {
    const { Answerer } = await import("./answerer.js");
    answerer = await Answerer.load();
  } catch (error) {
    page.model.textContent = "";
    tell(`The model cannot be loaded. ${error.message}`);
    return;
  }
  const { made, precision } = answerer.manifest;
  page.model.textContent = `${made.from} · ${precision}`;
  page["null-choice"].hidden = !answerer.knowsNoAnswer;
  page.go.disabled = false;
}

page.ask.addEventListener("submit", (event) => {
  event.preventDefault();
  if (answerer) ask();
});
page.answers.addEventListener("click", reveal);
page.edit.addEventListener("click", () => {
  edit();
  page.context.focus();
});
page.context.addEventListener("input", () => {
  forget();
  page.count.textContent = plural(length(page.context.value), "character");
});
document.addEventListener("keydown", (event) => {
  const sends = event.key === "Enter" && (event.ctrlKey || event.metaKey || (event.target === page.question && !event.shiftKey));
  if (!sends || event.isComposing) return;
  event.preventDefault();
  if (!page.go.disabled) page.ask.requestSubmit();
});

start();
