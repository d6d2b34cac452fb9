// The steering demonstration. The same code runs in a notebook, where Python answers each request, and in the static page, where
// all answers are in the page. Text of the data reaches the page through textContent only.

const CUT = 5; // cut-off of CP and NDCG

function element(tag, parent, text = "", attributes = {}) {
  const made = document.createElement(tag);
  if (text !== "") made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  parent?.append(made);
  return made;
}

const sum = (values) => values.reduce((total, value) => total + value, 0);
const byDescending = (keys) => keys.map((_, i) => i).sort((a, b) => keys[b] - keys[a] || a - b);

/** Rankings of SASRec, COREC at a strength, and the rule, each a list of candidates, best first, and what they are judged by. */
export function rank(state, answer, strength) {
  const { candidates } = state;
  const met = candidates.map((each) => answer.request.map((value) => each.values.includes(value)));
  const count = met.map((flags) => flags.filter(Boolean).length);
  const scores = candidates.map(
    (_, i) => answer.prior[i] + answer.relevance[i] + strength * sum(answer.control.map((part) => part.values[i])),
  );
  const orders = {
    sasrec: byDescending(candidates.map((each) => -each.rank)),
    corec: byDescending(scores),
    rule: byDescending(candidates.map((each, i) => count[i] * candidates.length - each.rank)),
  };
  return { met, count, scores, orders };
}

/** Control precision: share of the first five that meet the whole request; NaN for an empty request. */
export function precision(order, count, n) {
  const cut = Math.min(CUT, order.length);
  return n ? order.slice(0, cut).filter((i) => count[i] === n).length / cut : NaN;
}

function bump(state, ranked, n, parent) {
  const size = state.candidates.length, height = 18 * size + 30, width = 700;
  const shape = (tag, attributes, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text) made.textContent = text;
    svg.append(made);
  };
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", "rank of each candidate in SASRec's order (left) and in COREC's (right)");
  const y = (place) => 30 + 18 * place;
  const place = (order) => order.reduce((places, candidate, i) => ((places[candidate] = i), places), []);
  const [before, after] = [place(ranked.orders.sasrec), place(ranked.orders.corec)];
  shape("text", { x: 250, y: 12, "text-anchor": "end" }, "SASRec");
  shape("text", { x: 450, y: 12 }, "COREC");
  shape("line", { x1: 20, x2: width - 20, y1: y(CUT - 0.5), y2: y(CUT - 0.5), class: "cut" });
  state.candidates.forEach((candidate, i) => {
    const name = candidate.title.length > 32 ? candidate.title.slice(0, 31) + "…" : candidate.title;
    const kind = candidate.truth ? "truth" : n && ranked.count[i] === n ? "all" : "quiet";
    const [from, to] = [y(before[i]), y(after[i])];
    shape("path", { d: `M255 ${from} C 350 ${from}, 350 ${to}, 445 ${to}`, class: kind });
    shape("text", { x: 250, y: from + 4, "text-anchor": "end" }, `${name} ${before[i] + 1}`);
    shape("text", { x: 450, y: to + 4 }, `${after[i] + 1} ${name}${candidate.truth ? " ★" : ""}`);
  });
  parent.append(svg);
}

/**
 * Build the demonstration in an element.
 *
 * `source` has: about (text), users ([{id, name}]), open(user) → state, answer(user, values) → answer,
 * available(user, values) → whether this request can be answered.
 */
export async function mount(root, source) {
  root.classList.add("corec-steering");
  let state, answer, opened, strength = 1, hidden = false, started = performance.now(), turn = 0;

  element("p", root, source.about, { class: "note" });
  const controls = element("div", root, "", { class: "controls" });
  const labelled = (text, control, kind = "") => {
    const label = element("label", controls, "", kind ? { class: kind } : {});
    kind ? label.append(control, text) : label.append(text, control);
    return control;
  };
  const users = labelled("user", element("select", null, "", { "aria-label": "user", name: "user" }));
  for (const user of source.users) element("option", users, user.name, { value: user.id });
  const attributes = element("div", controls, "", { class: "controls" });
  const range = { type: "range", min: 0, max: 2, step: 0.05, value: 1, "aria-label": "strength of control", name: "strength" };
  const slider = element("input", null, "", range);
  const power = element("output", null, "1.00");
  const strengthLabel = element("label", controls, "strength λ (1: the ranker corec)  ");
  strengthLabel.append(slider, power);
  const predict = labelled("predict first", element("input", null, "", { type: "checkbox", name: "predict" }), "line");
  const reset = element("button", controls, "no constraints", { type: "button", name: "reset" });
  element("h2", root, "History, oldest first");
  const history = element("p", root, "", { class: "history" });
  const status = element("p", root, "", { class: "note", role: "status", "aria-live": "polite" });
  const lists = element("div", root, "", { class: "lists" });
  element("h2", root, "Before and after the request");
  const chart = element("div", root, "", { class: "chart" });
  const legend = "● constraint met, ○ not met, ★ the item that the user chose next; the dashed line is the cut-off of CP@5. " +
    "Blue: meets the whole request. Select an item of COREC's list to see the parts of its score.";
  element("p", root, legend, { class: "note" });

  const selects = () => [...attributes.querySelectorAll("select")];
  const chosen = () => selects().map((each) => each.value).filter((value) => value !== "").map(Number);

  function fillAttributes() {
    attributes.replaceChildren();
    state.attributes.forEach((name) => {
      const label = element("label", attributes, name);
      const select = element("select", label, "", { name, "aria-label": name });
      element("option", select, "any", { value: "" });
      for (const value of state.values.filter((each) => each.attribute === name)) {
        const option = element("option", select, `${value.label} (${value.count})`, { value: value.id });
        option.disabled = value.count === 0;
      }
      select.addEventListener("change", ask);
    });
  }

  function grey() { // values whose request, with the other choices, cannot be answered
    selects().forEach((select) => {
      const others = selects().filter((each) => each !== select && each.value !== "").map((each) => Number(each.value));
      for (const option of [...select.options].slice(1)) {
        const value = state.values.find((each) => each.id === Number(option.value));
        option.disabled = value.count === 0 || !source.available(opened, [...others, value.id]);
      }
    });
  }

  function item(parent, i, place, ranked, model) {
    const candidate = state.candidates[i], n = answer.request.length;
    const kind = `${n && ranked.count[i] === n ? "all" : ""} ${candidate.truth ? "truth" : ""}`;
    const line = element("li", parent, "", { class: kind });
    const head = model === "corec" ? element("summary", element("details", line)) : element("span", line);
    element("span", head, `${place + 1}.`, { class: "place" });
    element("span", head, candidate.title + (candidate.truth ? " ★" : ""), { class: "title" });
    element("span", head, ranked.met[i].map((met) => (met ? "●" : "○")).join(""), { class: "dots" });
    if (model !== "corec") return;
    const moved = candidate.rank - place;
    element("span", head, moved > 0 ? `▲${moved}` : moved < 0 ? `▼${-moved}` : "·", { class: "change" });
    const table = element("table", line.firstChild);
    const parts = [["prior (combiner)", answer.prior[i]], ["relevance (language model)", answer.relevance[i]]];
    for (const part of answer.control) parts.push([`control: ${part.name}, × ${strength.toFixed(2)}`, strength * part.values[i]]);
    for (const [name, value] of [...parts, ["score", ranked.scores[i]]]) {
      const row = element("tr", table);
      element("td", row, name);
      element("td", row, (Math.round(100 * value) / 100 + 0).toFixed(2));
    }
  }

  function show() {
    const ranked = rank(state, answer, strength), n = answer.request.length;
    lists.replaceChildren();
    chart.replaceChildren();
    for (const [model, name] of [["sasrec", "SASRec"], ["corec", "COREC"], ["rule", "rule: the best CP possible"]]) {
      const column = element("section", lists, "", { "data-model": model, "aria-label": name });
      element("h2", column, name);
      const order = ranked.orders[model], value = precision(order, ranked.count, n);
      if (model === "corec" && hidden) { guess(column, order); continue; }
      element("p", column, n ? `CP@${CUT} = ${value.toFixed(2)}` : `CP@${CUT}: no constraint`, { class: "metrics" });
      const list = element("ol", column);
      order.forEach((i, place) => item(list, i, place, ranked, model));
    }
    if (!hidden) bump(state, ranked, n, chart);
    const total = performance.now() - started;
    const model = answer.ms === null ? "pre-computed" : `language model ${answer.ms.toFixed(0)} ms`;
    status.textContent = `Answered in ${total.toFixed(0)} ms (${model}). Prompt: ${state.tokens} tokens` +
      (state.ms === null ? "." : `, computed once for this user in ${state.ms.toFixed(0)} ms.`);
  }

  function guess(column, order) {
    element("p", column, "Which candidate will be first?");
    const select = element("select", column, "", { "aria-label": "your guess", name: "guess" });
    state.candidates.forEach((each, i) => element("option", select, each.title, { value: i }));
    element("button", column, "Show the list", { type: "button", name: "show" }).addEventListener("click", () => {
      const place = order.indexOf(Number(select.value)) + 1;
      hidden = false;
      started = performance.now();
      show();
      status.textContent = `Your guess has rank ${place} of ${order.length}. ${status.textContent}`;
    });
  }

  async function ask() {
    if (!state) return; // a user is being opened, and asked when that is done
    started = performance.now();
    const current = ++turn;
    const found = await source.answer(opened, chosen());
    if (current !== turn) return; // a later change is being answered
    if (!found) { status.textContent = "This request has no computed answer: choose other constraints."; return; }
    answer = found;
    hidden = predict.checked && answer.request.length > 0;
    grey();
    show();
  }

  async function open() {
    started = performance.now();
    const current = ++turn;
    const user = users.value;
    state = answer = undefined;
    for (const each of selects()) each.disabled = true;
    status.textContent = "computing the prompt of this user …";
    const found = await source.open(user);
    if (current !== turn) return; // another user was chosen
    [state, opened] = [found, user];
    history.textContent = state.history.join(" → ");
    fillAttributes();
    await ask();
  }

  slider.addEventListener("input", () => {
    started = performance.now();
    strength = Number(slider.value);
    power.textContent = strength.toFixed(2);
    if (answer) show();
  });
  users.addEventListener("change", open);
  predict.addEventListener("change", () => { hidden = false; if (answer) ask(); });
  reset.addEventListener("click", () => { if (state) selects().forEach((each) => (each.value = "")); ask(); });
  await open();
}

// The widget of a notebook (anywidget): messages to Python and back, each with a number.
export default {
  render({ model, el }) {
    let number = 0;
    const waiting = new Map();
    const listen = (message) => {
      if (!waiting.has(message.number)) return;
      waiting.get(message.number)(message.result);
      waiting.delete(message.number);
    };
    model.on("msg:custom", listen);
    const call = (kind, user, request = []) =>
      new Promise((resolve) => {
        waiting.set(++number, resolve);
        model.send({ number, kind, user, request });
      });
    mount(el, {
      about: model.get("about"),
      users: model.get("users"),
      open: (user) => call("open", user),
      answer: (user, request) => call("answer", user, request),
      available: () => true,
    });
    return () => model.off("msg:custom", listen);
  },
};
