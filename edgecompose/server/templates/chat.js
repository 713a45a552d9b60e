"use strict";
// The page of a server: talks to /v1/chat/completions of the server that it came from, and to nothing else.

const $ = (id) => document.getElementById(id);
const messages = [];
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
  item.scrollIntoView({ block: "nearest" });
  return words;
};

const complain = (text) => { $("status").textContent = text; };

async function reason(response) {
  if (response.status === 401) $("keyline").hidden = false;
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

const rows = (table, found) => {
  const body = $(table).tBodies[0];
  body.replaceChildren();
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
  rows("nearest", found.neighbours.slice(0, 5).map((one) => [`${one.task}, example ${one.key}`, one.similarity, one.similarity.toFixed(3)]));
  const spent = Object.entries(found.timings_ms).filter(([, ms]) => ms >= 0.05);
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
  messages.push({ role: "user", content: text });
  say("user", text);
  stopping = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  $("talk").setAttribute("aria-busy", "true");
  let words = null;
  let answer = "";
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      signal: stopping.signal,
      body: JSON.stringify({
        model: $("model").value, messages, stream: true, max_tokens: Number($("tokens").value) || 128,
        edgecompose: { overflow: "truncate" },
      }),
    });
    if (!response.ok) throw new Error(await reason(response));
    words = say("assistant", "");
    for await (const found of events(response)) {
      if (found.error) throw new Error(found.error.message);
      answer += found.choices[0]?.delta.content ?? "";
      words.textContent = answer;
      if (found.edgecompose) explain(found.edgecompose);
    }
    if (!answer) words.textContent = "(an empty answer)";
  } catch (error) {
    if (error.name !== "AbortError") complain(error.message);
    if (!words) {  // nothing was answered: the message goes back to where it can be sent again
      messages.pop();
      $("talk").lastChild.remove();
      $("prompt").value = text;
    }
  } finally {
    if (words) messages.push({ role: "assistant", content: answer });
    $("send").disabled = false;
    $("stop").disabled = true;
    $("talk").setAttribute("aria-busy", "false");
    stopping = null;
    $("prompt").focus();
  }
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
  messages.length = 0;
  $("talk").replaceChildren();
  $("evidence").hidden = true;
  complain("");
  $("prompt").focus();
});
begin().catch((error) => complain(error.message));
