"use strict";
// Runs the script of the chat page against elements that only remember, and a server whose streams a test writes.
const fs = require("fs");
const vm = require("vm");

const element = (id) => {
  const made = {
    id, textContent: "", value: "", hidden: false, disabled: false, className: "", children: [], listeners: {},
    style: {}, tBodies: [], parentElement: null,
    append(...items) {
      for (const item of items) {
        if (typeof item === "object") item.parentElement = made;
        made.children.push(item);
      }
    },
    replaceChildren(...items) { made.children = items; },
    setAttribute() {}, focus() {}, scrollIntoView() { made.scrolled = true; }, requestSubmit() {},
    getBoundingClientRect: () => ({ bottom: 0 }),
    remove() { made.parentElement.children.splice(made.parentElement.children.indexOf(made), 1); },
    get lastChild() { return made.children[made.children.length - 1]; },
    addEventListener(name, call) { made.listeners[name] = call; },
    text() {
      return made.textContent + made.children.map((one) => (typeof one === "string" ? one : one.text())).join(" ");
    },
  };
  return made;
};

const elements = {};
const byId = (id) => {
  if (!elements[id]) {
    elements[id] = element(id);
    elements[id].tBodies = [element(`${id}-body`)];
    elements[id].parentElement = element(`${id}-parent`);
  }
  return elements[id];
};

const calls = [];
const respond = (text) => {
  let write;
  let close;
  const body = new ReadableStream({
    start(controller) {
      write = (part) => controller.enqueue(new TextEncoder().encode(part));
      close = () => controller.close();
    },
  });
  return { response: { ok: true, status: 200, body, json: async () => JSON.parse(text) }, write, close };
};

const fetch = async (path, options = {}) => {
  if (path === "health") return respond('{"bundle": "b", "device": "cpu"}').response;
  if (path === "v1/models") return respond('{"data": [{"id": "auto"}, {"id": "base"}]}').response;
  const { response, write, close } = respond("{}");
  const call = { body: JSON.parse(options.body), close };
  call.event = (value) => write(`data: ${typeof value === "string" ? value : JSON.stringify(value)}\n\n`);
  call.comment = () => write(": waiting\n\n");
  calls.push(call);
  if (options.signal) {
    const aborted = new Promise((_, fail) => options.signal.addEventListener("abort", () => {
      const error = new Error("aborted");
      error.name = "AbortError";
      fail(error);
    }));
    aborted.catch(() => {});
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    response.body = { pipeThrough: () => ({ getReader: () => ({ read: () => Promise.race([reader.read(), aborted]) }) }) };
  }
  return response;
};

const document = {
  getElementById: byId, createElement: (name) => element(name), addEventListener() {},
  documentElement: { scrollHeight: 0 },
};
const context = {
  document, fetch, TextDecoderStream, AbortController, innerHeight: 1000, console, setTimeout, Promise, Error, JSON, Object,
  Number, Math,
};
vm.createContext(context);
vm.runInContext(fs.readFileSync(process.argv[2], "utf8"), context);

const settle = () => new Promise((done) => setTimeout(done, 20));
const send = async (text) => {
  byId("prompt").value = text;
  byId("ask").listeners.submit({ preventDefault() {} });
  await settle();
  return calls[calls.length - 1];
};
const delta = (content, more = {}) => ({ choices: [{ delta: { content }, finish_reason: null }], ...more });
const last = (reason) => ({
  choices: [{ delta: {}, finish_reason: reason }],
  edgecompose: { method: "ties", weights: {}, distribution: {}, composition: "c", tokens: { generated: 7 } },
});

(async () => {
  await settle();
  const seen = {};
  let call = await send("tell a story");
  seen.firstBody = call.body;
  call.comment();
  await settle();
  seen.waiting = byId("status").textContent;
  call.event(delta("", { edgecompose: { method: "ties", weights: { yelp: 1 }, distribution: {}, composition: "abc" } }));
  call.event(delta("In the "));
  await settle();
  seen.whyEarly = byId("why").textContent;
  seen.hiddenTables = byId("tasks").parentElement.hidden;
  seen.scrolled = byId("ask").parentElement.scrolled === true;
  byId("reset").listeners.click();
  await settle();
  call = await send("and again");
  seen.afterReset = call.body.messages;
  call.event(delta("Yes"));
  call.event(last("length"));
  call.event("[DONE]");
  await settle();
  seen.cut = byId("talk").text();
  call = await send("more");
  seen.history = call.body.messages;
  call.event({ error: { message: "the server is ending" } });
  await settle();
  seen.error = byId("status").textContent;
  seen.returned = byId("prompt").value;
  process.stdout.write(JSON.stringify(seen));
})();
