/** The page: what is recorded or dropped becomes a card; two cards become a comparison. */

import { Microphone, RATE, decode, joined, toWav } from "./audio.js";
import { Links, MOST_SECONDS, compare } from "./compare.js";
import { Stream, askImages, askModels, askUnits, useKey } from "./server.js";
import { Peaks, Timeline, colourOf, describe, mark, prepare, redraw, segmentsOf, style } from "./timeline.js";

const NUM_IMAGES = 10; // shown of each recording
const find = (id) => document.getElementById(id);
const recordings = [];
const refused = []; // what to do again once there is a key
const links = new Links(find("links"), find("links-readout"));
let models = [];
let model; // its id
let reading = Promise.resolve(); // one request after the other, so that each one's time is its own
let take = null; // the recording being made
let numTakes = 0;

// ------------------------------------------------------------------------------------------------------- messages

function say(text) {
  find("status").textContent = text;
}

/** Show an error until it is dismissed; one that asks for a key opens the form and keeps `again` for later. */
function fail(error, about, again) {
  if (error.status === 401 && error.outdated) {
    again();
    return;
  }
  if (error.status === 401) {
    find("key-message").textContent = error.message;
    if (find("key-form").hidden) {
      find("key-form").hidden = false;
      find("key").focus();
    }
    refused.push(again);
    return;
  }
  const box = document.createElement("p");
  box.className = "notice error";
  const text = document.createElement("span");
  if (about) {
    const name = document.createElement("strong");
    name.textContent = about;
    text.append(name, " ");
  }
  text.append(error.message);
  const close = document.createElement("button");
  close.type = "button";
  close.className = "plain";
  close.textContent = "×";
  close.setAttribute("aria-label", "Dismiss");
  close.addEventListener("click", () => box.remove());
  box.append(text, close);
  find("errors").append(box);
}

find("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(find("key").value.trim());
  find("key").value = "";
  find("key-form").hidden = true;
  for (const again of refused.splice(0)) again();
});

// ------------------------------------------------------------------------------------------------------- models

async function loadModels() {
  try {
    models = await askModels();
  } catch (error) {
    find("lamp").className = "lamp off";
    find("model-name").textContent = error.status === 401 ? "A key is needed" : "No model";
    if (error.status === 503) {
      say("The server is loading its model…");
      setTimeout(loadModels, 1000);
    } else fail(error, "", loadModels);
    return;
  }
  say("");
  find("model-select").replaceChildren(...models.map(({ id }) => new Option(id, id)));
  find("model-choice").hidden = models.length < 2;
  showModel(models.find(({ id }) => id === model) ?? models[0]);
}

function showModel(about) {
  model = about.id;
  find("lamp").className = "lamp on";
  find("model-name").textContent = about.id;
  find("model-gist").textContent = `layer ${about.layer} · ${about.num_units} units · ${about.precision}`;
  const facts = [
    ["Name", about.id],
    ["Layer", `${about.layer} of ${about.num_layers}`],
    ["Dimensions", about.dim],
    ["Units", about.num_units || "no codebook"],
    ["Images", about.num_images || (about.grounded ? "none published" : "not grounded")],
    ["Precision", about.precision],
    ["Device", about.device],
    ["Digest", about.digest ?? "none"],
  ];
  find("model-facts").replaceChildren(
    ...facts.flatMap(([name, value]) => {
      const [term, text] = [document.createElement("dt"), document.createElement("dd")];
      term.textContent = name;
      text.textContent = value;
      if (name === "Digest") text.className = "digest";
      return [term, text];
    }),
  );
}

find("model-select").addEventListener("change", async () => {
  showModel(models.find(({ id }) => id === find("model-select").value));
  for (const recording of recordings) read(recording);
});

document.addEventListener("click", (event) => {
  if (!find("model").contains(event.target)) find("model").open = false;
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") find("model").open = false;
});

// ------------------------------------------------------------------------------------------------------- recordings

/** Read a file into a new card. */
function addFile(file) {
  reading = reading.then(async () => {
    say(`Reading ${file.name}…`);
    const recording = { name: file.name, blob: file, sent: file, wave: await decode(file) };
    await readNow(recording, () => addFile(file));
  });
}

/** Have the server read a recording, anew if it has been read. */
function read(recording) {
  reading = reading.then(() => readNow(recording, () => read(recording)));
}

async function readNow(recording, again) {
  try {
    let result;
    try {
      result = await askUnits(recording.sent, model);
    } catch (error) {
      // The browser reads kinds of files that the server does not: M4A, WebM.
      if (error.code !== "bad_audio" || !recording.wave || recording.converted) throw error;
      recording.converted = true;
      recording.sent = toWav(Int16Array.from(recording.wave, (x) => 32767 * Math.max(-1, Math.min(1, x))));
      result = await askUnits(recording.sent, model);
    }
    const segments = segmentsOf(result.units, result.durations_ms, result.start_ms);
    if (recording.live) recording.agreement = agreement(recording.live, segments);
    Object.assign(recording, { segments, seconds: result.seconds, latency: result.latency, frames: undefined });
    if (!recording.card) addCard(recording);
    show(recording);
    if (!recordings.includes(recording)) recordings.push(recording);
    choosePair(recording);
    const count = await showImages(recording, again);
    say(`${recording.name}: ${segments.length} segments${count ? `, ${count} images` : ""}`);
  } catch (error) {
    say("");
    if (recording.live && recording.segments) show(recording);
    fail(error, recording.name, again);
  }
  find("empty").hidden = recordings.length > 0 || document.querySelector(".recording") !== null;
}

/** Show what a recording speaks of, where the model finds images; how many. */
async function showImages(recording, again) {
  const { part } = recording;
  const { num_images: total } = models.find(({ id }) => id === model);
  part("images").hidden = !total;
  part("found").replaceChildren();
  if (!total) return 0;
  part("images").setAttribute("aria-label", `Images found for ${recording.name}`);
  part("images-note").textContent = `Searching ${total} images…`;
  try {
    const images = await askImages(recording.sent, model, NUM_IMAGES);
    part("images-note").textContent = `The nearest of ${total} to what was said, the nearest first, each with its score`;
    part("found").replaceChildren(...images.map(picture));
    return images.length;
  } catch (error) {
    part("images-note").textContent = error.message; // a recording too long to be one utterance, say
    if (error.status === 401) fail(error, recording.name, again);
    return 0;
  }
}

/** An image that was found, with its score and what is said of it. */
function picture({ id, rank, score, texts, thumbnail }) {
  const [item, frame, text] = ["li", thumbnail ? "img" : "span", "p"].map((kind) => document.createElement(kind));
  const said = texts.join("; ") || id;
  frame.className = "picture";
  if (thumbnail) {
    frame.src = thumbnail;
    frame.alt = "";
  } else frame.textContent = "no picture kept";
  const numbers = document.createElement("span");
  numbers.className = "numbers";
  const [place, points] = [document.createElement("strong"), document.createElement("span")];
  place.textContent = rank;
  points.textContent = score.toFixed(2);
  points.setAttribute("aria-label", `score ${score.toFixed(2)}`);
  numbers.append(place, points);
  text.textContent = said;
  item.title = texts.length ? `${id}: ${said}` : id;
  item.append(frame, numbers, text);
  return item;
}

/** The share of the frames that two readings give the same unit. */
function agreement(before, after) {
  const units = ({ unit, duration }) => Array(Math.round(duration / 20)).fill(unit);
  const [a, b] = [before.flatMap(units), after.flatMap(units)];
  return b.filter((unit, i) => unit === a[i]).length / b.length;
}

function addCard(recording) {
  const card = find("recording").content.firstElementChild.cloneNode(true);
  const part = (name) => card.querySelector(`[data-part="${name}"]`);
  part("name").textContent = recording.name;
  const timeline = new Timeline(part("scroller"));
  Object.assign(recording, { card, part, timeline });
  part("scroller").setAttribute("aria-label", `Units of ${recording.name}`);
  timeline.onChange = (segment) => {
    mark(segment?.unit ?? null);
    tell(recording, segment);
  };
  part("in").addEventListener("click", () => timeline.magnify(1.5));
  part("out").addEventListener("click", () => timeline.magnify(1 / 1.5));
  part("remove").addEventListener("click", () => remove(recording));
  preparePlayback(recording);
  find("recordings").prepend(card);
  find("empty").hidden = true;
}

/** A unit's colour and some words. */
function chip(unit, text) {
  const [whole, swatch] = [document.createElement("span"), document.createElement("span")];
  whole.className = "chip";
  swatch.className = "swatch";
  swatch.style.backgroundColor = colourOf(unit);
  whole.append(swatch, text);
  return whole;
}

/** Say what a segment is; without one, which units are heard longest. */
function tell(recording, segment) {
  const { part, segments } = recording;
  if (segment) {
    const times = segments.filter(({ unit }) => unit === segment.unit).length;
    const often = times === 1 ? "once" : `${times} times`;
    part("readout").replaceChildren(chip(segment.unit, `${describe(segment)} · ${often} in this recording`));
    return;
  }
  const totals = new Map();
  for (const { unit, duration } of segments) totals.set(unit, (totals.get(unit) ?? 0) + duration);
  const longest = [...totals].sort((a, b) => b[1] - a[1]).slice(0, 5);
  part("readout").replaceChildren("Heard longest", ...longest.map(([unit, ms]) => chip(unit, `${unit}, ${ms} ms`)));
}

function show(recording) {
  const { timeline, segments, seconds, part } = recording;
  timeline.peaks = new Peaks();
  if (recording.wave) timeline.peaks.add(recording.wave);
  timeline.show(segments, seconds);
  const facts = [`${seconds.toFixed(2)} s`, `${segments.length} segments`, `${new Set(segments.map((s) => s.unit)).size} different units`];
  if (recording.latency !== undefined) {
    const { latency } = recording;
    const pace = (1000 * seconds) / latency;
    const time = latency < 1000 ? `${latency.toFixed(0)} ms` : `${(latency / 1000).toFixed(1)} s`;
    facts.push(`answered in ${time}, ${pace.toFixed(pace < 10 ? 1 : 0)} × real time`);
  }
  if (recording.agreement !== undefined) {
    facts.push(`live: ${(recording.lag / 1000).toFixed(1)} s behind, same unit at ${(100 * recording.agreement).toFixed(0)} % of frames`);
  }
  if (recording.converted) facts.push("sent as 16 kHz WAV");
  if (!recording.wave) facts.push("this browser cannot show its sound");
  part("facts").replaceChildren(
    ...facts.map((text) => {
      const fact = document.createElement("span");
      fact.textContent = text;
      return fact;
    }),
  );
  tell(recording, null);
}

function remove(recording) {
  recording.audio?.pause();
  if (recording.url) URL.revokeObjectURL(recording.url);
  recording.timeline.remove();
  recording.card.remove();
  if (recordings.includes(recording)) recordings.splice(recordings.indexOf(recording), 1);
  mark(null);
  choosePair();
  find("empty").hidden = recordings.length > 0;
  say(`${recording.name} removed`);
  find("record").focus();
}

// ------------------------------------------------------------------------------------------------------- playback

function preparePlayback(recording) {
  const { part, timeline } = recording;
  const button = part("play");
  const audio = new Audio();
  recording.audio = audio;
  const follow = () => {
    timeline.point(audio.ended ? null : audio.currentTime);
    if (!audio.paused) requestAnimationFrame(follow);
  };
  const mode = (playing) => {
    button.classList.toggle("playing", playing);
    button.setAttribute("aria-label", `${playing ? "Pause" : "Play"} ${recording.name}`);
  };
  const toggle = () => (audio.paused ? audio.play().catch((error) => fail(error, recording.name)) : audio.pause());
  mode(false);
  audio.addEventListener("play", () => {
    for (const other of recordings) if (other !== recording) other.audio.pause();
    mode(true);
    follow();
  });
  audio.addEventListener("pause", () => mode(false));
  button.addEventListener("click", toggle);
  timeline.onPick = (ms) => {
    if (!audio.duration) return;
    audio.currentTime = Math.min(ms / 1000, audio.duration);
    timeline.point(audio.currentTime);
  };
  part("scroller").addEventListener("keydown", (event) => {
    if (event.key !== " " && event.key !== "Enter") return;
    event.preventDefault();
    const chosen = timeline.segments[timeline.chosen];
    if (chosen && audio.paused) audio.currentTime = chosen.start / 1000;
    toggle();
  });
  if (recording.blob) load(recording);
}

function load(recording) {
  recording.url = URL.createObjectURL(recording.blob);
  recording.audio.src = recording.url;
  recording.part("play").disabled = !recording.wave;
}

// ------------------------------------------------------------------------------------------------------- microphone

find("record").addEventListener("click", async () => {
  const button = find("record");
  button.disabled = true;
  try {
    await (take ? finish() : begin());
  } catch (error) {
    take = null;
    fail(error);
  }
  button.disabled = false;
  button.classList.toggle("recording-now", take !== null);
  find("record-label").textContent = take ? "Stop" : "Record";
  find("live").disabled = take !== null;
  if (document.activeElement === document.body) button.focus(); // a disabled button loses it
});

async function begin() {
  const made = { name: `Recording ${numTakes + 1}`, parts: [], samples: 0, levels: [], peaks: new Peaks() };
  const listen = (pcm) => {
    made.parts.push(pcm);
    made.samples += pcm.length;
    made.peaks.add(pcm);
    for (let at = 0; at < pcm.length; at += 320) {
      made.levels.push(pcm.subarray(at, at + 320).reduce((most, x) => Math.max(most, Math.abs(x)), 0) / 32768);
    }
    made.stream?.send(pcm);
    drawScope(made);
    if (made.recording) showLive(made);
  };
  made.microphone = await Microphone.open(listen);
  numTakes++;
  take = made;
  say(`Recording ${numTakes}: listening`);
  if (find("live").checked) beginLive(made);
}

async function finish() {
  const made = take;
  take = null;
  await made.microphone.stop();
  const pcm = joined(made.parts, Int16Array);
  await made.stream?.end();
  drawScope(null);
  const wave = Float32Array.from(pcm, (x) => x / 32768);
  const blob = toWav(pcm);
  const recording = made.recording ?? { name: made.name };
  Object.assign(recording, { blob, sent: blob, wave });
  if (made.lags?.length) {
    recording.live = recording.segments;
    recording.lag = made.lags.reduce((sum, x) => sum + x, 0) / made.lags.length;
  }
  if (recording.card) {
    load(recording);
    recording.card.classList.remove("live");
  }
  read(recording);
}

/** Send what is heard as it is heard; units come back as soon as nothing later can change them. */
function beginLive(made) {
  const recording = { name: made.name, segments: [], seconds: 0, wave: null };
  made.lags = [];
  addCard(recording);
  recording.card.classList.add("live");
  recording.part("play").disabled = true;
  made.recording = recording;
  made.stream = new Stream(model, {
    ready: (latency) => say(`${made.name}: live, units follow after ${(latency / 1000).toFixed(1)} s`),
    units: (start, units) => {
      const { segments } = recording;
      units.forEach((unit, i) => {
        const last = segments.at(-1);
        if (last?.unit === unit) last.duration += 20;
        else segments.push({ unit, start: start + 20 * i, duration: 20 });
      });
      if (take === made) made.lags.push((1000 * made.samples) / RATE - (start + 20 * units.length));
      showLive(made);
    },
    error: (error) => {
      fail(error, made.name);
      if (take === made && !recording.segments.length) {
        recording.timeline.remove();
        recording.card.remove();
        made.recording = undefined;
        made.lags = undefined;
      }
    },
  });
}

function showLive(made) {
  const { recording } = made;
  const { timeline, part } = recording;
  recording.seconds = made.samples / RATE;
  timeline.zoom = 1;
  timeline.peaks = made.peaks;
  timeline.show(recording.segments, Math.max(recording.seconds, 4));
  timeline.scroller.scrollLeft = timeline.track.offsetWidth;
  part("facts").textContent = `live · ${recording.seconds.toFixed(1)} s · ${recording.segments.length} segments`;
}

/** The last seconds of the microphone's level. */
function drawScope(made) {
  const canvas = find("scope");
  const { clientWidth: width, clientHeight: height } = canvas.parentElement;
  const context = prepare(canvas, width, height);
  find("clock").textContent = `${((made?.samples ?? 0) / RATE).toFixed(1)} s`;
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const middle = height / 2;
  context.fillStyle = style("--line");
  context.fillRect(0, middle, width, 1);
  if (!made) return;
  context.fillStyle = style("--record");
  if (still) {
    context.fillRect(0, middle - 3, width * Math.min(1, 1.5 * (made.levels.at(-1) ?? 0)), 6);
    return;
  }
  const count = Math.floor(width / 3);
  made.levels.slice(-count).forEach((level, i, all) => {
    const size = Math.max(2, Math.min(1, 1.5 * level) * (height - 12));
    context.fillRect(width - 3 * (all.length - i), middle - size / 2, 2, size);
  });
}

// ------------------------------------------------------------------------------------------------------- files

find("files").addEventListener("change", () => {
  for (const file of find("files").files) addFile(file);
  find("files").value = "";
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  find("drop").classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) find("drop").classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  find("drop").classList.remove("over");
  for (const file of event.dataTransfer.files) addFile(file);
});

// ------------------------------------------------------------------------------------------------------- comparison

let comparing = 0;

/** Keep the pair that is chosen where it still exists; a new recording becomes B. */
function choosePair(newest) {
  const [first, second] = [find("first"), find("second")];
  const [a, b] = [first, second].map((select) => recordings[select.selectedIndex]);
  const old = [first.dataset.key, second.dataset.key];
  const by = (key) => recordings.find(({ url }) => url === key);
  let [A, B] = [by(old[0]) ?? a, by(old[1]) ?? b];
  if (newest && newest !== A) B = newest;
  A ??= recordings.find((recording) => recording !== B);
  if (A === B || !B) B = recordings.findLast((recording) => recording !== A);
  for (const [select, chosen] of [[first, A], [second, B]]) {
    select.replaceChildren(...recordings.map(({ name }) => new Option(name)));
    select.selectedIndex = recordings.indexOf(chosen);
  }
  showPair();
}

async function showPair() {
  const [first, second] = [find("first"), find("second")];
  const [A, B] = [first, second].map((select) => recordings[select.selectedIndex]);
  first.dataset.key = A?.url ?? "";
  second.dataset.key = B?.url ?? "";
  find("comparison").hidden = recordings.length < 2 || !A || !B;
  if (find("comparison").hidden) return;
  const run = ++comparing;
  find("comparison").setAttribute("aria-busy", "true");
  find("links-readout").textContent = "Comparing…";
  try {
    const found = await compare(A, B, model);
    if (run !== comparing) return;
    showFound(found, [A.name, B.name]);
  } catch (error) {
    if (run === comparing) fail(error, "Comparison", showPair);
  } finally {
    if (run === comparing) find("comparison").setAttribute("aria-busy", "false");
  }
}

function showFound(found, names) {
  const percent = (share) => `${(100 * share).toFixed(0)} %`;
  const figures = [
    ["Unit edit distance", `${found.edits} of ${found.longest}`, `${percent(found.edits / found.longest)}: segments to insert, delete or replace`],
    ["Units in common", `${found.common} of ${found.either}`, `${percent(found.common / found.either)} of the units heard in either`],
    ["Same unit", percent(found.agreeing), "of A's frames meet their own unit in B"],
    ["Similarity", found.path.toFixed(2), `of the frames paired; ${found.chance.toFixed(2)} with B backwards`],
  ];
  find("figures").replaceChildren(
    ...figures.map(([name, value, note]) => {
      const figure = document.createElement("div");
      for (const [kind, text] of [["dt", name], ["dd", value], ["dd", note]]) {
        const part = document.createElement(kind);
        part.textContent = text;
        figure.append(part);
      }
      figure.lastElementChild.className = "note";
      return figure;
    }),
  );
  const duration = (segments) => segments.reduce((_, { start, duration }) => start + duration, 0) / 1000;
  links.showPair(names, found.a, found.b, found.links, Math.max(duration(found.a), duration(found.b)));
  find("comparison-note").textContent =
    "Each segment of A is joined to the stretch of B that sounds most like it, in order from start to end (dynamic time " +
    "warping of the frames). Colour: the same unit on both sides. Grey: another one." +
    (found.cut ? ` Compared are the first ${MOST_SECONDS} s of each.` : "");
}

find("first").addEventListener("change", showPair);
find("second").addEventListener("change", showPair);
find("swap").addEventListener("click", () => {
  const [first, second] = [find("first"), find("second")];
  [first.selectedIndex, second.selectedIndex] = [second.selectedIndex, first.selectedIndex];
  showPair();
});

// ------------------------------------------------------------------------------------------------------- begin

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  redraw();
  links.draw();
  drawScope(take);
});
new ResizeObserver(() => drawScope(take)).observe(find("scope").parentElement);
loadModels();
