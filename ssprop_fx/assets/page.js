"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const el = (tag, attributes = {}, ...children) => {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) if (value !== null) made.setAttribute(key, value);
  made.append(...children.filter((child) => child !== null));
  return made;
};
const svg = (inner, box) => `<svg viewBox="${box}" aria-hidden="true">${inner}</svg>`;
const flops = (n) => {
  for (const [unit, size] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]])
    if (n >= size * 0.9995) return `${(n / size).toPrecision(3)} ${unit}`;
  return `${Math.round(n)}`;
};
const bytes = (n) => {
  for (const [unit, size] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]])
    if (n >= size * 0.9995) return `${(n / size).toPrecision(3)} ${unit}`;
  return `${Math.round(n)} B`;
};
const percent = (share) => `${share > 0 ? "−" : share < 0 ? "+" : ""}${Math.abs(100 * share).toFixed(1)} %`;
const dims = (shape) => (shape ? (shape.length ? shape.join("\u200a×\u200a") : "scalar") : "");
const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;

/* ---- the tree: graph nodes in order, grouped by runs of the same module ---- */

let count = 0;
const all = []; // every item, groups before what they hold
function item(kind, parent, fields) {
  const made = { id: count++, kind, parent, depth: parent ? parent.depth + 1 : 0, children: [], open: true, ...fields };
  if (parent) parent.children.push(made);
  all.push(made);
  return made;
}

function build(section) {
  const root = item("group", null, { label: section.title, path: "", section: true });
  const stack = [{ group: root, segment: null }];
  section.items = section.nodes.map((node) => {
    // the section's title says already which submodule its graph is of
    const inside = section.graph && `${node.module}.`.startsWith(`${section.title}.`);
    const base = inside ? section.title.split(".").length : 0;
    const names = node.module ? node.module.split(".") : [], path = names.slice(base);
    let depth = 0;
    while (depth < path.length && depth + 1 < stack.length && stack[depth + 1].segment === path[depth]) depth++;
    stack.length = depth + 1;
    for (; depth < path.length; depth++) {
      const group = item("group", stack[depth].group, { label: path[depth], path: names.slice(0, base + depth + 1).join(".") });
      stack.push({ group, segment: path[depth] });
    }
    return item("node", stack[depth].group, { node, label: "", path: node.module });
  });
  section.items.forEach((it, i) => (it.inputs = section.nodes[i].inputs.map((j) => section.items[j])));
  flatten(root);
  return root;
}

/* A group of one operation is that operation; a group that holds nothing but a group is written as one line. */
function flatten(group) {
  group.children = group.children.map((child) => {
    if (child.kind !== "group") return child;
    flatten(child);
    if (child.children.length !== 1) return child;
    const only = child.children[0];
    only.label = only.label ? `${child.label}.${only.label}`.replace(".#", "#") : child.label;
    only.parent = group;
    return only;
  });
}

function settle(it, depth) {
  it.depth = depth;
  it.nodes = it.kind === "node" ? [it] : [];
  for (const child of it.children) {
    settle(child, depth + 1);
    it.nodes = it.nodes.concat(child.nodes);
  }
  it.units = it.nodes.flatMap((n) => n.node.units || []);
  it.dense = it.units.reduce((sum, u) => sum + data.units[u][1], 0);
  it.layer = it.kind === "node" && it.node.layer !== undefined ? data.layers[it.node.layer] : null;
  it.sparse = it.kind === "node" ? Boolean(it.node.after) : it.nodes.some((n) => n.node.after);
  it.text = it.kind === "node"
    ? [it.path, it.node.name, it.node.target, it.layer && [it.layer.name, it.layer.rule, ...it.layer.kinds].join(" ")].join(" ").toLowerCase()
    : `${it.path} ${it.label}`.toLowerCase();
}

const sections = data.sections.map(build);
const several = sections.length > 1 || !(data.sections[0] || { graph: true }).graph;
sections.forEach((root) => settle(root, several ? 0 : -1));
data.sections.forEach((section) => section.items.forEach((it) => {
  it.outputs = [];
}));
data.sections.forEach((section) => section.items.forEach((it) => it.inputs.forEach((from) => from.outputs.push(it))));
const kept = new Set(sections.flatMap(function within(it) { return [it, ...it.children.flatMap(within)]; }));

/* ---- what is visible, and the lanes of the graph ---- */

let visible = [];
let onlyConvolutions = false;
let lanes = 1;

function refresh() {
  visible = [];
  const walk = (it) => {
    const hidden = it.section && !several;
    if (onlyConvolutions && !(it.layer || (it.kind === "group" && it.nodes.some((n) => n.layer)))) return;
    if (!hidden) visible.push(it);
    if (it.kind === "group" && it.open) it.children.forEach(walk);
  };
  sections.forEach(walk);
  visible.forEach((it, i) => (it.at = i));
  layout();
  scale = visible.reduce((most, it) => (it.kind === "node" || !it.open ? Math.max(most, it.dense) : most), 0);
  if (chosen && !visible.includes(chosen)) {
    let up = chosen;
    while (up && !visible.includes(up)) up = up.parent;
    chosen = up;
  }
  rows.style.height = `${visible.length * rowHeight()}px`;
  document.documentElement.style.setProperty("--graph", `${graphWidth()}px`);
  draw(true);
}

/* One lane leads to the first reader of a result; a second one, further right, to the others, as in a commit graph. */
function layout() {
  const point = new Map();
  for (const it of visible)
    if (it.kind === "node" || !it.open) for (const n of it.nodes) point.set(n, it);
  const readers = new Map();
  for (const it of visible) {
    if (it.kind === "group" && it.open) continue;
    const to = new Set();
    for (const n of it.nodes) for (const out of reached(n, point)) to.add(out);
    to.delete(it);
    readers.set(it, [...to].filter((x) => x.at > it.at).sort((a, b) => a.at - b.at));
  }
  const active = [];
  const free = (from) => {
    let lane = from;
    while (active[lane]) lane++;
    return lane;
  };
  lanes = 1;
  for (const it of visible) {
    it.draw = [];
    const isPoint = readers.has(it);
    const coming = [];
    active.forEach((edge, lane) => {
      if (!edge) return;
      if (isPoint && edge.targets.has(it)) coming.push([lane, edge]);
      if (!isPoint || edge.last !== it) it.draw.push(["pass", lane, edge.side]);
    });
    if (!isPoint) continue;
    const ending = coming.filter(([, edge]) => edge.last === it);
    const lane = ending.length ? Math.min(...ending.map(([l]) => l)) : free(0);
    for (const [from, edge] of coming) it.draw.push(["in", from, edge.side, lane]);
    for (const [from] of ending) active[from] = null;
    it.lane = lane;
    const to = readers.get(it);
    if (to.length) {
      active[lane] = { targets: new Set([to[0]]), last: to[0], side: false };
      it.draw.push(["out", lane, false, lane]);
    }
    if (to.length > 1) {
      const side = free(lane + 1);
      active[side] = { targets: new Set(to.slice(1)), last: to[to.length - 1], side: true };
      it.draw.push(["out", side, true, lane]);
    }
    lanes = Math.max(lanes, ...it.draw.map((d) => d[1] + 1), lane + 1);
  }
}

/* The visible readers of a result; what is filtered away passes it on. */
function reached(node, point) {
  const found = [], seen = new Set(), queue = [...node.outputs];
  while (queue.length) {
    const next = queue.pop();
    if (seen.has(next)) continue;
    seen.add(next);
    if (point.has(next)) found.push(point.get(next));
    else queue.push(...next.outputs);
  }
  return found;
}

const narrow = matchMedia("(max-width: 760px)");
const rowHeight = () => (narrow.matches ? 44 : 28);
const laneWidth = () => Math.min(13, (narrow.matches ? 58 : 150) / lanes);
const graphWidth = () => Math.max(22, Math.ceil(lanes * laneWidth() + 8));

function graphCell(it) {
  const w = laneWidth(), h = rowHeight(), x = (lane) => (4 + (lane + 0.5) * w).toFixed(1), m = h / 2;
  const stroke = (lane, side) => (side ? ` style="stroke:var(--skip${lane % 4})"` : "");
  let out = "";
  for (const [what, lane, side, node] of it.draw) {
    const a = x(lane), b = x(node);
    if (what === "pass") out += `<path d="M${a} 0V${h}"${stroke(lane, side)}/>`;
    else if (what === "in") out += `<path d="${lane === node ? `M${a} 0V${m}` : `M${a} 0C${a} ${m * 0.8} ${b} ${m * 0.2} ${b} ${m}`}"${stroke(lane, side)}/>`;
    else out += `<path d="${lane === node ? `M${b} ${m}V${h}` : `M${b} ${m}C${b} ${h * 0.9} ${a} ${h * 0.6} ${a} ${h}`}"${stroke(lane, side)}/>`;
  }
  if (it.kind === "node" || !it.open) {
    const cx = x(it.lane);
    const shape = it.kind === "group" ? "folded" : "";
    if (shape) out += `<rect class="folded ${it.sparse ? "sparse" : ""}" x="${cx - 4.5}" y="${m - 4.5}" width="9" height="9" rx="2"/>`;
    else if (it.sparse) out += `<circle class="sparse" cx="${cx}" cy="${m}" r="5"/>`;
    else if (it.layer) out += `<circle class="ring" cx="${cx}" cy="${m}" r="4"/>`;
    else if (it.node.op === "placeholder" || it.node.op === "output") out += `<rect x="${cx - 3.5}" y="${m - 3.5}" width="7" height="7"/>`;
    else out += `<circle cx="${cx}" cy="${m}" r="3"/>`;
  }
  return `<svg width="${graphWidth()}" height="${h}" aria-hidden="true">${out}</svg>`;
}

/* ---- rows, only those in view ---- */

const rows = $("rows"), scroller = $("scroll");
let scale = 0, chosen = null, query = "", matches = new Set(), drawn = new Map();

function draw(anew = false) {
  if (anew) {
    rows.replaceChildren();
    drawn = new Map();
  }
  const h = rowHeight();
  const from = Math.max(0, Math.floor(scroller.scrollTop / h) - 12);
  const to = Math.min(visible.length, Math.ceil((scroller.scrollTop + scroller.clientHeight) / h) + 12);
  for (const [i, row] of drawn)
    if (i < from || i >= to) {
      row.remove();
      drawn.delete(i);
    }
  let made = null;
  for (let i = from; i < to; i++)
    if (!drawn.has(i)) {
      const row = rowOf(visible[i]);
      row.style.top = `${i * h}px`;
      drawn.set(i, row);
      (made = made || document.createDocumentFragment()).append(row);
    }
  if (made) rows.append(made);
  mark();
}

const chevron = svg('<path d="M3 1.5 7 5 3 8.5" fill="none" stroke="currentColor" stroke-width="1.6" stroke-linecap="round" stroke-linejoin="round"/>', "0 0 10 10");

function rowOf(it) {
  const group = it.kind === "group";
  const row = el("div", {
    class: `row ${group ? "group" : it.layer ? "conv" : "plain"} ${it.section ? "section" : ""}`, id: `row${it.id}`, role: "treeitem",
    "aria-level": it.depth + 1, "aria-selected": "false", "aria-expanded": group ? String(it.open) : null,
  });
  row.dataset.id = it.id;
  row.innerHTML = graphCell(it);
  const name = el("div", { class: "name", style: `padding-left:${Math.max(0, it.depth) * (narrow.matches ? 9 : 16) + (group ? 0 : 16)}px` });
  const target = group ? "" : it.node.target;
  const label = it.label || (group ? "" : it.node.op === "placeholder" ? it.node.name.replace(/^l_(.*)_$/, "$1") : target);
  if (group) {
    const fold = el("button", { class: "fold", type: "button", tabindex: "-1", "aria-label": `${it.open ? "Collapse" : "Expand"} ${label}` });
    fold.innerHTML = chevron;
    name.append(fold);
  }
  name.append(el("span", { class: "label", title: it.path || label }, label));
  if (group && !it.open) name.append(el("span", { class: "count" }, plural(it.nodes.length, "operation")));
  const operation = label === target ? "" : target, shape = group ? "" : dims(it.node.shape);
  if (!group) name.append(el("span", { class: "sub" }, [operation, shape].filter(Boolean).join("  ·  ")));
  row.append(name, el("div", { class: "op", title: target }, operation), el("div", { class: "shape" }, shape));
  row.append(el("div", { class: "kept" }), el("div", { class: "cost" }));
  fill(row, it);
  return row;
}

let phase = 0;
const now = (it) => it.units.reduce((sum, u) => sum + data.phases[phase].flops[u], 0);

function fill(row, it) {
  const keptCell = row.querySelector(".kept"), cost = row.querySelector(".cost");
  if (it.kind === "group" && it.open) return;
  if (!it.dense) return;
  const sum = now(it);
  if (it.kind === "node") {
    const [, , total] = data.units[it.units[0]];
    keptCell.replaceChildren(String(data.phases[phase].kept[it.units[0]]), el("s", {}, ` / ${total}`));
  }
  const share = (n) => `${scale ? (100 * n) / scale : 0}%`;
  if (!cost.firstChild) cost.append(el("div", { class: "bar" }, el("i"), el("b")), el("div", { class: "number" }));
  const [bar, number] = cost.children;
  bar.children[0].style.width = share(it.dense);
  bar.children[1].style.width = share(sum);
  bar.title = `${flops(sum)}FLOP kept of ${flops(it.dense)}FLOP`;
  bar.classList.toggle("reason", it.kind === "node" && !it.sparse);
  number.textContent = flops(sum);
}

function mark() {
  for (const [i, row] of drawn) {
    const it = visible[i];
    row.classList.toggle("chosen", it === chosen);
    row.setAttribute("aria-selected", String(it === chosen));
    row.classList.toggle("match", matches.has(it));
    row.classList.toggle("other", matches.size > 0 && !matches.has(it) && it.kind === "node");
  }
  if (chosen) scroller.setAttribute("aria-activedescendant", `row${chosen.id}`);
  else scroller.removeAttribute("aria-activedescendant");
}

function show(it) {
  for (let up = it.parent; up; up = up.parent) if (!up.open) up.open = true;
  if (!visible.includes(it)) refresh();
}

function choose(it, details = !$("detail").hidden && !narrow.matches) {
  show(it);
  chosen = it;
  const h = rowHeight(), top = it.at * h;
  if (details) describe(it);
  // the details cover the lower part of a narrow window
  const end = details && narrow.matches ? $("detail").getBoundingClientRect().top - scroller.getBoundingClientRect().top : Infinity;
  const room = Math.min(scroller.clientHeight, end);
  if (top < scroller.scrollTop + h) scroller.scrollTop = Math.max(0, top - 2 * h);
  else if (top + 2 * h > scroller.scrollTop + room) scroller.scrollTop = top + 2 * h - room;
  draw();
}

function toggle(it, open = !it.open) {
  if (it.kind !== "group" || it.open === open) return;
  it.open = open;
  refresh();
}

/* ---- details ---- */

const codeBlock = (text, kind = "") => {
  const block = el("pre", { class: kind });
  const parts = text.split(/('[^']*'|(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?\b)/);
  parts.forEach((part, i) => block.append(i % 2 ? el("span", { class: part[0] === "'" ? "s" : "n" }, part) : part));
  return block;
};
/* one block a statement, so that wrapped lines are indented */
const codeBlocks = (text, kind) => {
  const block = codeBlock("", kind);
  text.split("\n").forEach((line) => {
    const inner = el("div");
    inner.append(...codeBlock(line).childNodes);
    block.append(inner);
  });
  return block;
};

function describe(it) {
  const detail = $("detail"), layer = it.layer, group = it.kind === "group";
  detail.hidden = false;
  document.querySelector("main").classList.add("open");
  const close = el("button", { class: "icon", type: "button", "aria-label": "Close details", title: "Close (esc)" });
  close.innerHTML = svg('<path d="M4 4l10 10M14 4 4 14" stroke="currentColor" stroke-width="1.6" stroke-linecap="round"/>', "0 0 18 18");
  close.onclick = closeDetail;
  const title = layer ? layer.name : it.path || it.label || it.node.name;
  const under = group ? plural(it.nodes.length, "operation") : layer ? [it.node.target, ...layer.kinds.filter((kind) => kind !== it.node.target.toLowerCase())].join(", ") : it.node.target;
  detail.replaceChildren(el("div", { class: "top" }, el("h2", {}, title), close), el("p", { class: "under" }, under));
  const facts = el("dl", { class: "facts" });
  const fact = (term, value) => value !== "" && value !== null && value !== undefined && facts.append(el("dt", {}, term), el("dd", {}, value));
  if (group) {
    const inside = it.nodes.filter((n) => n.layer);
    fact("Convolutions", `${inside.length}, of which ${inside.filter((n) => n.sparse).length} rewritten`);
  } else {
    fact("Output", dims(it.node.shape));
    if (layer) {
      fact("Input", dims(layer.input));
      fact("Weight", dims(layer.weight));
      fact("Calls a step", layer.calls > 1 ? String(layer.calls) : "");
    }
  }
  if (it.dense) {
    const sum = now(it);
    fact("Backward", `${flops(sum)}FLOP of ${flops(it.dense)}FLOP, ${percent(1 - sum / it.dense)}`);
    const read = it.units.reduce((total, u) => total + data.phases[phase].memory[u], 0);
    fact("Gradient read", `${bytes(read)} of ${bytes(it.units.reduce((total, u) => total + data.units[u][3], 0))}`);
  }
  if (layer) {
    const factor = data.phases[phase].factor;
    if (it.units.length) {
      const unit = it.units[0], total = data.units[unit][2];
      fact("Kept", `${data.phases[phase].kept[unit]} of ${total} ${layer.kinds.includes("depthwise") ? "groups" : "channels"}${layer.kinds.includes("grouped") && !layer.kinds.includes("depthwise") ? " of each group" : ""}`);
    }
    if (layer.rewritten) {
      fact("Drop rate", layer.rate && factor !== 1 ? `${layer.rate} × factor ${+factor.toFixed(3)} = ${+(layer.rate * factor).toFixed(3)}` : String(layer.rate));
      fact("Rule", layer.rule);
      fact("Criterion", layer.gradients === "weight" ? `${layer.criterion}, weight gradient only` : layer.criterion);
      if (layer.rate) fact("Rewritten in", { graph: "a graph", module: "the module’s call", call: "the function’s call" }[layer.rung]);
    }
  }
  detail.append(facts);
  const all = layer && layer.rate && it.units.length && it.units.every((u) => data.phases[phase].kept[u] === data.units[u][2]);
  const reason = layer && (layer.reason || (all && (data.phases[phase].factor ? "rounded up to all channels" : "factor 0 at this step")));
  if (reason) detail.append(el("p", { class: "notice" }, `Dense: ${reason}`));
  if (!group) {
    if (it.node.after) {
      detail.append(el("h3", {}, "Before"), codeBlocks(it.node.code, "gone"), el("h3", {}, "After"), codeBlocks(it.node.after, "new"));
      for (const [stage, code] of it.node.lowered || []) {
        const lines = code.split("\n").length;
        detail.append(el("h3", {}, stage.replace(/^b/, "B"), lines > 1 ? el("span", {}, `  ${lines} statements`) : ""), codeBlocks(code));
      }
    } else detail.append(el("h3", {}, "Code"), codeBlocks(it.node.code));
  }
  if (layer && it.units.length && data.phases.length > 1) {
    const unit = it.units[0], total = data.units[unit][2], table = el("div", { class: "phases" });
    const order = data.phases.map((p, i) => i).sort((a, b) => data.phases[a].factor - data.phases[b].factor);
    const step = Math.ceil(order.length / 12);
    order.filter((p, i) => i % step === 0 || p === phase).forEach((p) => {
      const k = data.phases[p].kept[unit], here = p === phase ? "now" : "";
      const bar = el("div", { class: "bar" }, el("i", { style: "width:100%" }), el("b", { style: `width:${(100 * k) / total}%` }));
      table.append(el("span", { class: here }, `factor ${+data.phases[p].factor.toFixed(2)}`), bar, el("span", { class: here }, `${k} / ${total}`));
    });
    detail.append(el("h3", {}, "Kept over the schedule"), table);
  }
  if (!group) for (const [title, list] of [["Takes", it.inputs], ["Gives to", it.outputs]])
    if (list.length) {
      const links = el("div", { class: "links" });
      [...new Set(list)].slice(0, 24).forEach((other) => {
        const link = el("button", { type: "button" }, other.label ? other.path : `${other.path ? other.path + " " : ""}${other.node.op === "placeholder" ? other.node.name : other.node.target}`);
        link.onclick = () => choose(other, true);
        links.append(link);
      });
      detail.append(el("h3", {}, title), links);
    }
}

function closeDetail() {
  $("detail").hidden = true;
  document.querySelector("main").classList.remove("open");
  scroller.focus({ preventScroll: true });
  draw(true);
}

/* ---- schedule ---- */

const slider = $("step");
const total = (p) => data.phases[p].flops.reduce((a, b) => a + b, 0);
const dense = data.units.reduce((sum, unit) => sum + unit[1], 0);

function curve() {
  const n = data.steps.length, top = 1, h = 20;
  const end = Math.max(1, n - 1); // the slider's thumb goes from 0 to n - 1: half a step is left and right of it
  let path = `M0 ${h}`;
  data.steps.forEach(([, , p], i) => {
    const y = h - (h - top) * data.phases[p].factor;
    path += `L${Math.max(0, i - 0.5)} ${y}L${n > 1 ? Math.min(end, i + 0.5) : end} ${y}`;
  });
  $("curve").setAttribute("viewBox", `0 0 ${end} ${h}`);
  $("curve").innerHTML = `<path d="${path}L${end} ${h}Z"/><line id="here" y1="0" y2="${h}"/>`;
}

function goTo(position) {
  const [from, to, p] = data.steps[position];
  phase = p;
  slider.value = position;
  const factor = data.phases[p].factor;
  $("stepLabel").replaceChildren(el("b", {}, from === to ? `Step ${from}` : `Steps ${from}–${to}`), el("span", {}, `, factor ${+factor.toFixed(3)}${factor ? "" : ", dense"}`));
  slider.setAttribute("aria-valuetext", $("stepLabel").textContent);
  $("here").setAttribute("x1", position);
  $("here").setAttribute("x2", position);
  figures();
  for (const [i, row] of drawn) fill(row, visible[i]);
  if (!$("detail").hidden && chosen) describe(chosen);
}

function figures() {
  const box = $("figures");
  if (!dense) return box.replaceChildren(el("div", {}, el("dt", {}, "before the first training step"), el("dd", {}, "FLOPs unknown")));
  const sum = total(phase);
  const figure = (term, value, small) => el("div", {}, el("dt", {}, term), el("dd", {}, value, small ? el("small", {}, ` ${small}`) : ""));
  const list = [
    figure("convolutions, backward", `${flops(sum)}`, `of ${flops(dense)}FLOP`),
    figure("at this step", percent(1 - sum / dense)),
    figure(data.cycle[1] - data.cycle[0] > 1 ? "mean over the schedule" : "at every step", percent(1 - data.mean / dense)),
  ];
  if (data.stepFlops && !narrow.matches) list.push(figure("mean, whole step", percent((dense - data.mean) / data.stepFlops)));
  box.replaceChildren(...list);
}

/* ---- search ---- */

function search(text) {
  query = text.trim().toLowerCase();
  const words = query.split(/\s+/).filter(Boolean);
  const pool = [...kept].filter((it) => it.kind === "node" && (!onlyConvolutions || it.layer));
  matches = new Set(words.length ? pool.filter((it) => words.every((word) => it.text.includes(word))) : []);
  $("matches").textContent = words.length ? (matches.size ? "" : "no match") : "";
  if (matches.size) jump(0, true);
  else draw();
}

function jump(by, first = false) {
  const found = data.sections.flatMap((s) => s.items).filter((it) => matches.has(it));
  if (!found.length) return;
  const at = found.indexOf(chosen);
  const next = first ? Math.max(0, at) : at < 0 ? 0 : (at + by + found.length) % found.length;
  $("matches").textContent = `${next + 1} of ${found.length}`;
  choose(found[next]);
}

/* ---- input ---- */

scroller.addEventListener("scroll", () => requestAnimationFrame(() => draw()), { passive: true });
rows.addEventListener("click", (event) => {
  const row = event.target.closest(".row");
  if (!row) return;
  const it = all[Number(row.dataset.id)];
  scroller.focus({ preventScroll: true });
  if (event.target.closest(".fold")) {
    chosen = it;
    toggle(it);
  } else {
    choose(it, true);
  }
});
rows.addEventListener("dblclick", (event) => {
  const row = event.target.closest(".row");
  if (row && !event.target.closest(".fold")) toggle(all[Number(row.dataset.id)]);
});

$("search").addEventListener("input", (event) => search(event.target.value));
$("search").addEventListener("keydown", (event) => {
  if (event.key === "Enter") {
    event.preventDefault();
    jump(event.shiftKey ? -1 : 1);
  } else if (event.key === "Escape") {
    event.stopPropagation();
    event.target.value = "";
    search("");
    scroller.focus({ preventScroll: true });
  } else if (event.key === "ArrowDown") {
    event.preventDefault();
    scroller.focus({ preventScroll: true });
  }
});
slider.addEventListener("input", () => goTo(Number(slider.value)));
const every = (open) => {
  for (const it of kept) if (it.kind === "group" && !it.section) it.open = open;
  refresh();
};
$("collapse").onclick = () => every(false);
$("expand").onclick = () => every(true);
$("convolutions").onclick = () => {
  onlyConvolutions = !onlyConvolutions;
  $("convolutions").setAttribute("aria-pressed", String(onlyConvolutions));
  refresh();
};

document.addEventListener("keydown", (event) => {
  if (event.target.tagName === "INPUT" && event.target.type === "search") return;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const page = Math.max(1, Math.floor(scroller.clientHeight / rowHeight()) - 2);
  const move = (by) => visible.length && choose(visible[Math.min(visible.length - 1, Math.max(0, (chosen ? chosen.at : by > 0 ? -1 : 0) + by))]);
  const onSlider = event.target === slider, onButton = event.target.tagName === "BUTTON";
  const keys = {
    "/": () => $("search").focus(),
    Escape: () => (!$("detail").hidden ? closeDetail() : (chosen = null, draw())),
    ",": () => goTo(Math.max(0, Number(slider.value) - 1)),
    ".": () => goTo(Math.min(data.steps.length - 1, Number(slider.value) + 1)),
    t: () => $("theme").click(),
  };
  if (!onSlider) Object.assign(keys, {
    ArrowDown: () => move(1),
    ArrowUp: () => move(-1),
    PageDown: () => move(page),
    PageUp: () => move(-page),
    Home: () => move(-visible.length),
    End: () => move(visible.length),
    ArrowLeft: () => {
      if (!chosen) return;
      if (chosen.kind === "group" && chosen.open) toggle(chosen, false);
      else if (chosen.parent && visible.includes(chosen.parent)) choose(chosen.parent);
    },
    ArrowRight: () => {
      if (chosen && chosen.kind === "group") chosen.open ? move(1) : toggle(chosen, true);
    },
  });
  if (!onSlider && !onButton) keys.Enter = () => chosen && choose(chosen, true);
  if (keys[event.key]) {
    event.preventDefault();
    keys[event.key]();
  }
});

/* ---- light and dark ---- */

const dark = matchMedia("(prefers-color-scheme: dark)");
const sun = svg('<circle cx="9" cy="9" r="3.4" fill="none" stroke="currentColor" stroke-width="1.5"/><path d="M9 1v2M9 15v2M1 9h2M15 9h2M3.3 3.3l1.4 1.4M13.3 13.3l1.4 1.4M3.3 14.7l1.4-1.4M13.3 4.7l1.4-1.4" stroke="currentColor" stroke-width="1.5" stroke-linecap="round"/>', "0 0 18 18");
const moon = svg('<path d="M15 11.2A6.6 6.6 0 0 1 6.8 3a6.6 6.6 0 1 0 8.2 8.2Z" fill="none" stroke="currentColor" stroke-width="1.5" stroke-linejoin="round"/>', "0 0 18 18");
let theme = null;
function paint() {
  const name = theme || (dark.matches ? "dark" : "light");
  document.documentElement.dataset.theme = name;
  $("theme").innerHTML = name === "dark" ? sun : moon;
}
$("theme").onclick = () => {
  theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  paint();
};
dark.addEventListener("change", paint);

/* ---- begin ---- */

paint();
$("model").textContent = data.model;
$("facts").textContent = `${data.rewritten}, policy ${data.digest}`;
if (data.sections.every((section) => section.items.length === 0)) scroller.textContent = "There is nothing to show.";
slider.max = data.steps.length - 1;
curve();
refresh();
goTo(Math.max(0, data.steps.findIndex(([from, to]) => from <= data.step && data.step <= to)));
narrow.addEventListener("change", () => {
  refresh();
  figures();
});
new ResizeObserver(() => draw()).observe(scroller);
