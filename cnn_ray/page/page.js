// The page asks the endpoint's own interface, as curl would. Texts from outside (file names, labels, error messages) are
// only ever set as text, never parsed as HTML.
"use strict";

const MOST_LABELS = 10;
const byId = (id) => document.getElementById(id);
const needsKey = document.documentElement.dataset.needsKey === "yes";

let picture = null; // {file: Blob, name: string}: what is asked about
let answer = null; // the verdict that is shown
let request = null; // AbortController of the request under way
const shown = {}; // id of an <img> -> the blob URL that it shows

function element(name, className, text) {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

function showImage(id, blob) {
  if (shown[id]) URL.revokeObjectURL(shown[id]);
  shown[id] = blob ? URL.createObjectURL(blob) : null;
  if (blob) byId(id).src = shown[id];
  else byId(id).removeAttribute("src");
}

// A name that a terminal or a reader could take for something else is never shown raw: control characters would be typed
// by a paste, and characters that turn the direction of writing round make one name look like another.
const printable = (name) => name.replace(/[\p{C}\u2028\u2029]/gu, (c) => `\\u${c.codePointAt(0).toString(16).padStart(4, "0")}`);

function shellWord(text) {
  return /^[\w.,:\/@%+=-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

function contentType() {
  const type = picture ? picture.file.type : "image/png";
  return /^image\/[\w.+-]+$/.test(type) ? type : "image/png"; // the server looks at the bytes, and says what they are not
}

function urlOf(verb, name, version) {
  const part = version && `/${/^[0-9]+$/.test(version) ? "versions" : "labels"}/${encodeURIComponent(version)}`;
  return new URL(`v1/models/${encodeURIComponent(name)}${part}:${verb}`, document.baseURI).href;
}

const chosenUrl = () => urlOf("predict", byId("model").value, byId("version").value.trim());

function showCommand() {
  const name = picture ? picture.name : "shot.png";
  const safe = name === printable(name) && name !== "-" ? name : "FILE";
  const words = ["curl", "--data-binary", shellWord(`@${safe}`), "-H", `"Content-Type: ${contentType()}"`];
  if (needsKey) words.push("-H", '"Authorization: Bearer $KEY"');
  byId("curl").textContent = [...words, shellWord(chosenUrl())].join(" ");
  byId("copied").textContent = "";
}

function showProblem(text, requestId) {
  const parts = [];
  if (text) {
    const alert = element("p", "alert warning", text);
    if (requestId) alert.append(element("small", "", `Request ${requestId}`));
    parts.push(alert);
  }
  byId("problem").replaceChildren(...parts);
}

function clearAnswer(text) {
  answer = null;
  byId("verdict").replaceChildren(element("p", "soft", text));
  byId("details").hidden = true;
  clearHeat();
  showProblem("");
}

function clearHeat() {
  byId("heat").hidden = true;
  byId("heat-state").textContent = "";
  showImage("heat-image", null);
}

// The response of the endpoint, or an Error with the server's own words and the request's id.
async function post(url, signal) {
  const headers = { "Content-Type": contentType() };
  const key = byId("key").value.trim();
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(url, { method: "POST", body: picture.file, headers, signal, cache: "no-store" });
  } catch (error) {
    if (signal.aborted) throw error;
    throw new Error("No answer: the server cannot be reached, closed the connection, or the file has changed.");
  }
  if (response.ok) return response;
  const raw = await response.text();
  const error = new Error(serverWords(raw) || `The server answered ${response.status} ${response.statusText}`.trim());
  error.requestId = response.headers.get("X-Request-ID");
  throw error;
}

function serverWords(raw) {
  try {
    const words = JSON.parse(raw).error;
    return typeof words === "string" ? words : "";
  } catch {
    return "";
  }
}

// Runs the work as the only request under way: a newer one ends it, and what it would have shown is not shown.
async function alone(work) {
  if (request) request.abort();
  const own = (request = new AbortController());
  try {
    await work(own.signal);
  } catch (error) {
    if (own.signal.aborted) return;
    showProblem(error.message, error.requestId);
  }
}

function check() {
  if (!picture) return showProblem("Choose a screenshot first.");
  if (needsKey && !byId("key").value.trim()) {
    showProblem("This server wants an API key.");
    return byId("key").focus();
  }
  clearAnswer("Checking …");
  return alone(async (signal) => {
    try {
      const response = await post(chosenUrl(), signal);
      const said = await response.json();
      if (!signal.aborted) showAnswer(said);
    } catch (error) {
      if (!signal.aborted) clearAnswer("No verdict.");
      throw error;
    }
  });
}

function showAnswer(said) {
  answer = said;
  const line = element("p", "facts-line", "");
  line.append(element("span", "score", said.score.toFixed(4)));
  if (said.flagged !== null) {
    line.append(element("span", said.flagged ? "badge bad" : "badge good", said.flagged ? "flagged" : "not flagged"));
  }
  line.append(element("span", "soft", `${said.model}@${said.version}`));
  byId("verdict").replaceChildren(element("p", "label", printable(said.label)), line);
  showScores(Object.entries(said.scores));
  byId("details").hidden = false;
}

function showScores(scores) {
  scores.sort((a, b) => b[1] - a[1]);
  const rows = scores.slice(0, MOST_LABELS).map(([label, score]) => {
    const row = document.createElement("tr");
    const name = element("th", "", printable(label));
    name.scope = "row";
    const bar = element("span", "bar", "");
    bar.style.width = `${100 * Math.min(Math.max(score, 0), 1)}%`;
    const track = element("span", "track", "");
    track.append(bar);
    const cell = document.createElement("td");
    cell.append(track);
    row.append(name, cell, element("td", "number", score.toFixed(4)));
    return row;
  });
  byId("scores").replaceChildren(...rows);
  const more = scores.length - rows.length;
  byId("rest").textContent = more > 0 ? `and ${more} labels more, each with less` : "";
}

// The heat map of the version that gave the verdict, whatever an alias means by now.
function explain() {
  clearHeat();
  showProblem("");
  byId("heat-state").textContent = "Making the heat map …";
  return alone(async (signal) => {
    try {
      const response = await post(urlOf("explain", answer.model, String(answer.version)), signal);
      const png = await response.blob();
      if (signal.aborted) return;
      showImage("heat-image", png);
      byId("heat-image").alt = `The screenshot in grey; coloured is what lowers the score of ${printable(answer.label)} when hidden.`;
      byId("heat").hidden = false;
      byId("heat-state").textContent = `What speaks for ${printable(answer.label)}:`;
    } catch (error) {
      if (!signal.aborted) byId("heat-state").textContent = "";
      throw error;
    }
  });
}

function take(file, name) {
  if (!file) return;
  picture = { file, name };
  byId("hint").textContent = "Choose, drop or paste another";
  byId("preview").hidden = false;
  showImage("preview", file);
  byId("file-name").textContent = `${printable(name)}, ${file.size.toLocaleString("en")} bytes`;
  showCommand();
  clearAnswer("Not checked yet.");
  check();
}

async function copy() {
  const command = byId("curl");
  try {
    await navigator.clipboard.writeText(command.textContent); // only over HTTPS and on localhost
    byId("copied").textContent = "Copied.";
  } catch {
    getSelection().selectAllChildren(command);
    byId("copied").textContent = document.execCommand("copy") ? "Copied." : "Press Ctrl-C to copy.";
  }
}

function hasFiles(event) {
  return event.dataTransfer && [...event.dataTransfer.types].includes("Files");
}

function start() {
  byId("key-field").hidden = !needsKey;
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    check();
  });
  byId("file").addEventListener("change", (event) => {
    const [file] = event.target.files;
    if (file) take(file, file.name);
    event.target.value = ""; // so that the same file can be chosen again
  });
  byId("preview").addEventListener("error", () => {
    byId("preview").hidden = true;
  });
  for (const id of ["model", "version"]) byId(id).addEventListener("input", showCommand);
  byId("explain").addEventListener("click", explain);
  byId("copy").addEventListener("click", copy);
  addEventListener("paste", (event) => {
    const [file] = event.clipboardData.files;
    if (!file) return; // text goes where the cursor is
    event.preventDefault();
    take(file, file.name || "screenshot.png");
  });
  addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.toggle("dropping", hasFiles(event));
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dropping");
  });
  addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dropping");
    const [file] = event.dataTransfer.files;
    if (file) take(file, file.name);
    else showProblem("Drop a file: save the picture first, or copy and paste it.");
  });
  showCommand();
}

start();
