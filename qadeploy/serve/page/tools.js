// Functions that both pages use. Spans count code points, JavaScript strings UTF-16 units: only `cut` and `length` convert.

export const $ = (id) => document.getElementById(id);

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null) continue;
    if (name.startsWith("--")) element.style.setProperty(name, value);
    else if (name === "text") element.textContent = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** Splits a text at two positions, given in code points. */
export function cut(text, start, end) {
  let unit = 0;
  let point = 0;
  const forward = (until) => {
    for (; point < until && unit < text.length; point += 1) unit += text.codePointAt(unit) > 0xffff ? 2 : 1;
    return unit;
  };
  const first = forward(start);
  const last = forward(end);
  return [text.slice(0, first), text.slice(first, last), text.slice(last)];
}

export function length(text) {
  let points = 0;
  for (const _ of text) points += 1;
  return points;
}

export const number = (value) => value.toLocaleString("en");
export const plural = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;

export function percent(score) {
  if (score < 0.01) return "< 1 %";
  return score > 0.99 && score < 1 ? "> 99 %" : `${Math.round(100 * score)} %`;
}
