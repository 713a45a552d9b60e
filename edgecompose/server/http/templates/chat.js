"use strict";
// The page of a server: talks to /v1/chat/completions of the server that it came from, and to nothing else.

const $ = (id) => document.getElementById(id);
let messages = [];  // of the conversation on the screen; a new conversation has a new list
let stopping = null;

const headers = () => {
  const key = $("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
};

const element = (name, text, kind) => {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
};

const say = (role, text) => {
  const item = element("li", undefined, role);
  const words = element("span", text);
  item.append(element("b", role === "user" ? "You" : "Answer"), words);
  $("talk").append(item);
  follow(true);
  return words;
};

// Keeps the end of the conversation in view while it grows, unless the reader has scrolled up.
const section = () => $("ask").parentElement;
const atEnd = () => section().getBoundingClientRect().bottom <= innerHeight + 40;
const follow = (wasAtEnd) => { if (wasAtEnd) section().scrollIntoView({ block: "end" }); };

const complain = (text) => { $("status").textContent = text; };

async function reason(response) {
  if (response.status === 401) {
    $("keyline").hidden = false;
    return "This server needs its key: enter it below.";
  }
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

const rows = (table, found) => {
  const body = $(table).tBodies[0];
  body.replaceChildren();
  $(table).parentElement.hidden = !found.length;
  for (const [name, value, shown, kind] of found) {
    const row = element("tr", undefined, kind);
    const bar = element("meter");
    bar.max = 1;
    bar.value = Math.max(0, value);
    bar.setAttribute("aria-hidden", "true");
    const cell = element("td");
    cell.append(bar, ` ${shown}`);
    row.append(element("td", name), cell);
    body.append(row);
  }
};

const percent = (share) => `${(100 * share).toFixed(1)} %`;

function explain(found) {
  const weights = Object.entries(found.weights);
  const shares = Object.entries(found.distribution);
  const total = weights.reduce((sum, [, weight]) => sum + weight, 0);
  $("evidence").hidden = false;
  $("why").textContent = weights.length
    ? `${found.method} of ${weights.length} adapter${weights.length > 1 ? "s" : ""}, composition ${found.composition.slice(0, 12)}`
    : "The base answered alone: no task stands out, or none was asked for.";
  rows("adapters", weights.map(([name, weight]) => [name, weight / (total || 1), weight.toFixed(3)]));
  rows("tasks", shares.slice(0, 8).map(([name, share]) => [name, share, percent(share)]));
  rows("nearest", (found.neighbours ?? []).slice(0, 5).map((one) => [`${one.task}, example ${one.key}`, one.similarity, one.similarity.toFixed(3)]));
  const spent = Object.entries(found.timings_ms ?? {}).filter(([, ms]) => ms >= 0.05);
  $("time").parentElement.hidden = !spent.length;
  $("time").textContent = spent.map(([stage, ms]) => `${stage} ${ms.toFixed(1)} ms`).join(", ");
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part.startsWith(":")) {  // a comment: the answer is still to come
        yield { waiting: true };
        continue;
      }
      const text = part.replace(/^data: /, "");
      if (text === "[DONE]") return;
      yield JSON.parse(text);
    }
  }
}

async function ask(text) {
  complain("");
  $("evidence").hidden = true;  // it is that of the answer before
  $("why").textContent = "";
  const talk = messages;
  const isShown = () => talk === messages;  // no more after "New conversation"
  talk.push({ role: "user", content: text });
  say("user", text);
  const mine = stopping = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  $("talk").setAttribute("aria-busy", "true");
  let words = null;
  let answer = "";
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      signal: mine.signal,
      body: JSON.stringify({
        model: $("model").value, messages: talk, stream: true,
        ...(Number($("tokens").value) > 0 ? { max_tokens: Number($("tokens").value) } : {}),
        edgecompose: { overflow: "truncate" },
      }),
    });
    if (!response.ok) throw new Error(await reason(response));
    for await (const found of events(response)) {
      if (found.error) throw new Error(found.error.message);
      if (!isShown()) continue;
      if (found.waiting) {
        complain(words ? "" : "Waiting: the server is answering others, or reading a long message.");
        continue;
      }
      complain("");
      words ??= say("assistant", "");
      const wasAtEnd = atEnd();
      const choice = found.choices[0];
      answer += choice?.delta.content ?? "";
      words.textContent = answer;
      if (found.edgecompose) explain(found.edgecompose);
      if (choice?.finish_reason === "length") note(words, found.edgecompose?.tokens?.generated);
      follow(wasAtEnd);
    }
    if (words && !answer) words.textContent = "(an empty answer)";
  } catch (error) {
    if (isShown()) {
      complain(error.name === "AbortError" ? "" : error.message);
      if (!words) {  // nothing was answered: the message goes back to where it can be sent again
        talk.pop();
        $("talk").lastChild.remove();
        $("prompt").value = text;
      }
    }
  } finally {
    if (words) talk.push({ role: "assistant", content: answer });
    if (stopping === mine) finish();
  }
}

const note = (words, tokens) => words.parentElement.append(
  element("p", `Cut at ${tokens ?? "its longest"} tokens: give a longer answer room, or write "go on".`));

function finish() {
  $("send").disabled = false;
  $("stop").disabled = true;
  $("talk").setAttribute("aria-busy", "false");
  stopping = null;
  $("prompt").focus();
}

async function begin() {
  const health = await (await fetch("health")).json();
  $("bundle").textContent = `bundle ${health.bundle}, on ${health.device}`;
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) {
    complain(await reason(response));
    return;
  }
  complain("");
  $("keyline").hidden = true;
  const chosen = $("model").value;
  $("model").replaceChildren();
  for (const { id } of (await response.json()).data) {
    const option = element("option", id === "auto" ? "auto: chosen for each message" : id);
    option.value = id;
    $("model").append(option);
  }
  $("model").value = chosen;
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || stopping) return;
  $("prompt").value = "";
  ask(text);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") stopping?.abort(); });
$("stop").addEventListener("click", () => stopping?.abort());
$("key").addEventListener("change", () => begin().catch((error) => complain(error.message)));
$("reset").addEventListener("click", () => {
  stopping?.abort();
  messages = [];
  finish();
  $("talk").replaceChildren();
  $("evidence").hidden = true;
  $("why").textContent = "";
  complain("");
});
begin().catch((error) => complain(error.message));
