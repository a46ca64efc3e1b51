"use strict";
// The question browser. All text of the run enters the page through textContent, never as markup.
(() => {
  const MOST_LISTED = 400;
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const list = byId("list"), detail = byId("detail"), search = byId("search");
  const fate = byId("fate"), origin = byId("origin"), count = byId("count");

  function make(tag, className, text, ...children) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined && text !== null) node.textContent = text;
    node.append(...children);
    return node;
  }

  const counted = (group, verdict) => group.rollouts.filter((rollout) => rollout.right === verdict).length;
  const score = (group) => `${counted(group, true)}/${group.rollouts.length - counted(group, null)}`;
  const plain = (visit) => visit.groups.find((group) => group.kind === "plain");
  const trail = (question) =>
    question.visits.map((visit) => score(plain(visit))).join(" → ") + (question.later ? " → …" : "");
  const percent = (share) => `${Math.round(1000 * share) / 10}\u00a0%`;
  const OUTCOMES = {
    admitted: "admitted to the buffer", kept: "stays in the buffer", graduated: "graduates", none: "buffer unchanged",
  };
  const ORIGINS = { new: "new question", replay: "replayed" };

  function options(select, values) {
    select.append(make("option", "", "all"));
    for (const value of values) select.append(make("option", "", value));
  }

  function matches(question) {
    if (fate.value !== "all" && question.fate !== fate.value) return false;
    if (origin.value !== "all" && !question.visits.some((visit) => ORIGINS[visit.origin] === origin.value)) return false;
    const wanted = search.value.trim().toLowerCase();
    return !wanted || `${question.id}\n${question.text}\n${question.gold}`.toLowerCase().includes(wanted);
  }

  function refresh() {
    const found = data.questions.filter(matches);
    const more = found.length > MOST_LISTED ? `; the first ${MOST_LISTED} are listed` : "";
    count.textContent = `${found.length} of ${data.questions.length} question${data.questions.length === 1 ? "" : "s"}${more}`;
    list.replaceChildren(...found.slice(0, MOST_LISTED).map(entry));
    return found;
  }

  function entry(question) {
    const about = make("span", "about", null, make("span", "", trail(question)), make("span", "", question.fate));
    const button = make("button", "", null, make("span", "text", question.text), about);
    button.type = "button";
    button.dataset.id = question.id;
    button.addEventListener("click", () => {
      history.replaceState(null, "", `#q=${encodeURIComponent(question.id)}`);
      show(question);
    });
    return make("li", "", null, button);
  }

  function show(question) {
    for (const button of list.querySelectorAll("button")) {
      button.setAttribute("aria-current", String(button.dataset.id === question.id));
    }
    const entered = question.entry === null ? "" : `, last admitted at ${percent(Number(question.entry))}`;
    detail.replaceChildren(
      make("h3", "", question.text),
      make("div", "dim", `right answer ${question.gold} · ${question.id} · ${question.fate}${entered}`),
      ...pictures(question),
      ...question.visits.map(visitView),
      ...(question.later ? [make("p", "dim", laterVisits(question.later))] : []),
    );
    detail.scrollTop = 0;
  }

  function laterVisits(count) {
    const visits = count === 1 ? "1 later visit is" : `${count} later visits are`;
    return `${visits} in the rollout store and not here, where one question may not take too much of the page.`;
  }

  function pictures(question) {
    if (!question.pictures.length) return [];
    return [make("div", "pictures", null, ...question.pictures.map((shown) => {
      if (shown.copy === null) return make("figure", "absent", null, make("figcaption", "", shown.words));
      const image = make("img");
      image.src = data.copies[shown.copy];
      image.alt = shown.words;
      return make("figure", "", null, image, make("figcaption", "", shown.words));
    }))];
  }

  function visitView(visit, index) {
    const facts = ` step ${visit.step} · ${ORIGINS[visit.origin] || visit.origin} · plain ${score(plain(visit))}`;
    const outcome = ` · ${OUTCOMES[visit.outcome] || visit.outcome}`;
    const summary = make("summary", "", `Visit ${index + 1} `, make("span", "", facts + outcome));
    const node = make("details", "visit", null, summary, make("div", "body", null, ...visit.groups.map((group) => groupView(group, visit))));
    node.open = true;
    return node;
  }

  const TITLES = { plain: "The student, on the plain prompt", teacher: "The teacher" };

  function groupView(group, visit) {
    const name = TITLES[group.kind] || `${group.kind.toUpperCase()} prompt, as the student saw it`;
    const later = group.step === visit.step ? "" : ` · with step ${group.step}`;
    const node = make("div", "", null, make("h4", "", name, make("span", "", ` · ${score(group)} right${later}`)));
    if (group.kind === "plain" || group.kind === "teacher") {
      const prompt = make("details", "fold", null, make("summary", "", "the prompt"), make("pre", "", group.prompt));
      node.append(answers(group), prompt);
      return node;
    }
    node.append(make("pre", "", group.prompt));
    if (group.candidates.length) node.append(unseen(group.candidates));
    node.append(make("h4", "", "Its replies"), answers(group));
    return node;
  }

  function unseen(candidates) {
    const items = candidates.map((candidate) => {
      const verdict = make("span", candidate.correct ? "right" : "wrong", candidate.correct ? "right" : "wrong");
      return make("li", "", `from the ${candidate.source}, answer ${candidate.answer ?? "none"}, `, verdict);
    });
    return make("div", "unseen", "What the student was not told of the candidates, in order:", make("ol", "", null, ...items));
  }

  function answers(group) {
    return make("ul", "answers", null, ...group.rollouts.map((rollout) => {
      const mark = rollout.right === null ? "no reward:" : rollout.right ? "✓" : "✗";
      const verdict = make("span", rollout.right ? "right" : "wrong", `${mark} ${rollout.answer ?? "no answer"}`);
      const reply = make("span", rollout.response.length > 400 ? "reply long" : "reply", rollout.response);
      return make("li", "", null, verdict, reply, make("span", "about", facts(rollout)));
    }));
  }

  function facts(rollout) {
    const parts = rollout.right === null ? [] : [`reward ${rollout.reward}`];
    if (rollout.length !== null) parts.push(`${rollout.length} tokens`);
    if (rollout.finish_reason !== "stop") parts.push(`ended by ${rollout.finish_reason}`);
    const [low, high] = rollout.versions;
    if (low !== undefined) parts.push(low === high ? `policy ${low}` : `policy ${low}–${high}`);
    if (rollout.note) parts.push(rollout.note);
    return parts.join(" · ");
  }

  function fromAddress() {
    const wanted = location.hash.startsWith("#q=") ? decodeURIComponent(location.hash.slice(3)) : null;
    return data.questions.find((question) => question.id === wanted);
  }

  options(fate, [...new Set(data.questions.map((question) => question.fate))].sort());
  options(origin, Object.values(ORIGINS));
  for (const control of [search, fate, origin]) {
    control.addEventListener("input", () => {
      const found = refresh();
      if (found.length) show(found[0]);
    });
  }
  window.addEventListener("hashchange", () => {
    const question = fromAddress();
    if (question) show(question);
  });
  refresh();
  show(fromAddress() || data.questions[0]);
})();
