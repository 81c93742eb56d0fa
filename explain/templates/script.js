"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const PAGE = 25, NOTICEABLE = 0.02;
const list = document.getElementById("list"), count = document.getElementById("count"), more = document.getElementById("more");
const search = document.getElementById("search"), byClass = document.getElementById("class"), who = document.getElementById("who");
let found = [], shown = 0;

function element(name, text, className) {
  const node = document.createElement(name);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
}

// Classes of an answer come in the order of the labels.
const sameAs = (one, other) => one.join() === other.join();
const wrong = (row, version) => !sameAs(row.a[version][0], row.y);
const names = classes => classes.map(label => data.labels[label]).join(", ") || "none";
const filters = [
  ["all of them", () => true],
  ["versions disagree", row => row.a.some(answer => !sameAs(answer[0], row.a[0][0]))],
  ["every version is wrong", row => row.a.every((_, version) => wrong(row, version))],
  ...data.versions.map((name, version) => [`${name} is wrong`, row => wrong(row, version)]),
  ...data.versions.slice(1).map((name, index) => [
    `${name} is wrong, ${data.versions[0]} right`, row => wrong(row, index + 1) && !wrong(row, 0)]),
  ...data.versions.slice(1).map((name, index) => [
    `${name} is right, ${data.versions[0]} wrong`, row => !wrong(row, index + 1) && wrong(row, 0)]),
  ["explained", row => row.w !== undefined],
  ...data.versions.slice(1).flatMap((name, index) => [
    [`${name} is right, for other reasons`, row => row.o && row.o[index] && !wrong(row, index + 1)],
    [`${name} is wrong, for other reasons`, row => row.o && row.o[index] && wrong(row, index + 1)]]),
];
filters.forEach(([name], index) => who.append(new Option(name, index)));
data.labels.forEach((label, index) => byClass.append(new Option(label, index)));
const textOf = row => (row.w ? row.w.join("") : row.t);

function answer(row, version) {
  const [classes, probability] = row.a[version];
  const node = element("span", `${data.versions[version]}: `);
  node.append(element("b", names(classes), wrong(row, version) ? "wrong" : "right"), ` ${probability.toFixed(2)}`);
  return node;
}

function words(row, version, position) {
  const node = element("p", undefined, "text");
  const values = row.v[version][position];
  const largest = Math.max(0.05, ...row.v.flatMap(one => one[position].map(Math.abs)));
  row.w.forEach((segment, index) => {
    const value = values[index], blank = segment.length - segment.trimStart().length;
    node.append(segment.slice(0, blank));
    const word = element("span", segment.slice(blank));
    if (Math.abs(value) >= NOTICEABLE) {
      word.className = value > 0 ? "for" : "against";
      word.style.setProperty("--weight", (Math.abs(value) / largest).toFixed(2));
      word.title = `${(100 * value).toFixed(1)} points`;
    }
    node.append(word);
  });
  return node;
}

function agreement([correlation, top, flips]) {
  const parts = [];
  if (correlation !== null) parts.push(`order of words ${correlation.toFixed(2)}`);
  if (top !== null) parts.push(`top words in common ${Math.round(100 * top)} %`);
  if (flips !== null) parts.push(`signs flipped ${Math.round(100 * flips)} %`);
  return parts.length ? `against ${data.versions[0]}: ${parts.join(", ")}` : "";
}

function explained(row) {
  const node = element("div"), chooser = element("select"), columns = element("div", undefined, "versions");
  chooser.setAttribute("aria-label", "Class that the words speak for");
  row.c.forEach((label, position) => chooser.append(new Option(data.labels[label], position)));
  chooser.value = Math.max(0, row.c.indexOf(row.a[0][0][0]));
  const draw = () => {
    columns.replaceChildren(...data.versions.map((_, version) => {
      const column = element("div"), head = element("h4");
      head.append(answer(row, version));
      column.append(head, words(row, version, Number(chooser.value)));
      if (version) column.append(element("p", agreement(row.r[version - 1][Number(chooser.value)]), "agreement"));
      return column;
    }));
  };
  chooser.addEventListener("change", draw);
  draw();
  const label = element("label", "Words coloured for or against ");
  label.append(chooser);
  node.append(label, columns);
  return node;
}

function item(row) {
  const node = element("li"), meta = element("div", undefined, "meta");
  meta.append(element("span", `text ${row.n}`), element("span"));
  meta.lastChild.append("true class: ", element("b", names(row.y)));
  if (!row.w) data.versions.forEach((_, version) => meta.append(answer(row, version)));
  node.append(meta, row.w ? explained(row) : element("p", row.t, "text"));
  return node;
}

function extend() {
  list.append(...found.slice(shown, shown + PAGE).map(item));
  shown = Math.min(found.length, shown + PAGE);
  more.hidden = shown >= found.length;
}

function apply() {
  const wanted = search.value.toLowerCase(), keep = filters[Number(who.value)][1];
  found = data.rows.filter(row =>
    keep(row) && (byClass.value === "" || row.y.includes(Number(byClass.value))) && textOf(row).toLowerCase().includes(wanted));
  count.textContent = `${found.length} texts`;
  list.replaceChildren();
  shown = 0;
  extend();
}

search.addEventListener("input", apply);
byClass.addEventListener("change", apply);
who.addEventListener("change", apply);
more.addEventListener("click", () => {
  const next = shown;
  extend();
  list.children[next].tabIndex = -1;
  list.children[next].focus();
});
document.getElementById("filters").addEventListener("submit", event => event.preventDefault());
apply();
