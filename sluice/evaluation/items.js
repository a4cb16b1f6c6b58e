"use strict";
// Texts of models and users are only ever written with textContent: nothing of them becomes markup.
const data = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
const PAGE = 100;
const state = { sort: "gain", down: false, shown: PAGE };

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function choices(select, values) {
  for (const [value, text] of values) {
    const option = element("option", text);
    option.value = value;
    select.append(option);
  }
}

const slices = [...new Set(data.rows.flatMap((row) => Object.entries(row.s).map(([k, v]) => `${k}=${v}`)))].sort();
const outcomes = [...new Set(data.rows.flatMap((row) => row.o))].sort();
choices(find("metric"), data.metrics.map(([name, title], index) => [index, title]));
choices(find("slice"), slices.map((name) => [name, name]));
choices(find("outcome"), outcomes.map((name) => [name, name]));
find("metric").value = String(Math.max(0, data.metrics.findIndex(([name]) => name === data.main)));

function values(row, index) {
  const [old, fresh] = row.m[index] ?? [null, null];
  const sign = data.metrics[index] && !data.metrics[index][3] ? -1 : 1;
  return { old, fresh, gain: old === null || fresh === null ? null : sign * (fresh - old) };
}

function show(number, decimals) {
  return number === null ? "–" : number.toFixed(decimals);
}

function signed(number, decimals) {
  if (number === null) return "–";
  const text = Math.abs(number).toFixed(decimals);
  return Number(text) === 0 ? text : (number > 0 ? "+" : "−") + text;
}

// What is compared comes first: the frame may be narrow.
const COLUMNS = [
  ["id", "Item", (row) => row.id],
  ["gain", "Gain", (row, m) => values(row, m).gain],
  ["new", "Candidate", (row, m) => values(row, m).fresh],
  ["old", "Champion", (row, m) => values(row, m).old],
  ["slice", "Slices", (row) => Object.values(row.s).join(", ")],
  ["outcome", "Outcomes", (row) => (row.o[0] === row.o[1] ? row.o[0] : `${row.o[0]} → ${row.o[1]}`)],
  ["question", "Question", (row) => row.q],
  ["after", "Candidate's answer", (row) => row.a[1]],
  ["before", "Champion's answer", (row) => row.a[0]],
];

function matches(row, wanted) {
  const { gain } = values(row, wanted.metric);
  const kind = gain === null ? "none" : gain > 0 ? "better" : gain < 0 ? "worse" : "same";
  if (wanted.gain && kind !== wanted.gain) return false;
  if (wanted.slice && !Object.entries(row.s).some(([k, v]) => `${k}=${v}` === wanted.slice)) return false;
  if (wanted.outcome && !row.o.includes(wanted.outcome)) return false;
  return !wanted.text || [row.id, row.q, row.r, ...row.a, ...row.c].join("\n").toLowerCase().includes(wanted.text);
}

function compare(left, right) {
  if (left === null || right === null) return (left === null) - (right === null);
  const order = typeof left === "number" ? left - right : String(left).localeCompare(String(right));
  return state.down ? -order : order;
}

function details(row) {
  const cell = element("td");
  cell.colSpan = COLUMNS.length;
  cell.append(element("p", row.q, "question"));
  const sides = element("div", undefined, "sides");
  for (const [title, text] of [[`Champion · ${row.o[0]}`, row.a[0]], [`Candidate · ${row.o[1]}`, row.a[1]], ["Reference", row.r]]) {
    const side = element("div");
    side.append(element("b", title), element("span", text || "(empty)"));
    sides.append(side);
  }
  const scores = element("p", undefined, "quiet");
  scores.textContent = data.metrics
    .map(([, title, decimals], index) => {
      const { old, fresh, gain } = values(row, index);
      return `${title} ${show(old, decimals)} → ${show(fresh, decimals)} (gain ${signed(gain, decimals)})`;
    })
    .join(" · ");
  cell.append(sides, scores);
  for (const cause of row.c) cell.append(element("p", `Without a score: ${cause}`, "quiet"));
  const line = element("tr", undefined, "details");
  line.append(cell);
  return line;
}

function line(row, metric) {
  const made = element("tr", undefined, "item");
  made.tabIndex = 0;
  const decimals = data.metrics[metric] ? data.metrics[metric][2] : 0;
  for (const [name, , get] of COLUMNS) {
    const value = get(row, metric);
    const number = ["old", "new", "gain"].includes(name);
    const text = name === "gain" ? signed(value, decimals) : number ? show(value, decimals) : value;
    const cell = element("td", undefined, number ? `number ${name}` : name);
    cell.append(element("div", text, number ? "" : "clamp"));
    if (name === "gain" && value) cell.append(element("span", value > 0 ? "▲" : "▼", value > 0 ? "up" : "down"));
    made.append(cell);
  }
  const open = () => (made.nextSibling?.className === "details" ? made.nextSibling.remove() : made.after(details(row)));
  made.addEventListener("click", open);
  made.addEventListener("keydown", (event) => event.key === "Enter" && open());
  return made;
}

function draw() {
  const wanted = {
    text: find("search").value.trim().toLowerCase(),
    metric: Number(find("metric").value || 0),
    gain: find("gain").value,
    slice: find("slice").value,
    outcome: find("outcome").value,
  };
  const get = COLUMNS.find(([name]) => name === state.sort)[2];
  const found = data.rows.filter((row) => matches(row, wanted));
  found.sort((a, b) => compare(get(a, wanted.metric), get(b, wanted.metric)) || (a.id < b.id ? -1 : 1));
  const head = element("tr");
  for (const [name, title] of COLUMNS) {
    const sorted = name === state.sort;
    const cell = element("th", undefined, ["old", "new", "gain"].includes(name) ? "number" : name);
    cell.setAttribute("aria-sort", sorted ? (state.down ? "descending" : "ascending") : "none");
    const button = element("button", title + (sorted ? (state.down ? " ↓" : " ↑") : ""), "plain");
    button.addEventListener("click", () => {
      state.down = sorted ? !state.down : false;
      state.sort = name;
      draw();
    });
    cell.append(button);
    head.append(cell);
  }
  document.querySelector("#items thead").replaceChildren(head);
  document.querySelector("#items tbody").replaceChildren(...found.slice(0, state.shown).map((row) => line(row, wanted.metric)));
  find("count").textContent = `${found.length} of ${data.rows.length} items`;
  find("more").hidden = found.length <= state.shown;
}

for (const id of ["search", "metric", "gain", "slice", "outcome"])
  find(id).addEventListener("input", () => {
    state.shown = PAGE;
    draw();
  });
find("more").addEventListener("click", () => {
  state.shown += 5 * PAGE;
  draw();
});
draw();
