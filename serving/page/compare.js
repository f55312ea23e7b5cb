/** Two recordings laid side by side. */

import { askFrames } from "./server.js";
import { Panel, colourOf, describe, drawAxis, drawSegments, seconds, style } from "./timeline.js";

export const MOST_SECONDS = 60; // of each recording: the table of the alignment has a cell a pair of frames
const FRAME_MS = 20;
const A = { name: 2, top: 20, height: 34 };
const B = { name: 202, top: 162, height: 34 };
const AXIS = 222;

/** The segments of so many frames, the last one cut off where they end. */
function within(segments, numFrames) {
  const end = FRAME_MS * numFrames;
  const kept = segments.filter(({ start }) => start < end);
  return kept.map((segment) => ({ ...segment, duration: Math.min(segment.duration, end - segment.start) }));
}

/** A unit for every frame. */
function framesOf(segments) {
  return segments.flatMap(({ unit, duration }) => Array(Math.round(duration / FRAME_MS)).fill(unit));
}

/** What two sequences of segments have in common, and where the path puts each of A's. */
export function relate(a, b, { first, last, likeness }) {
  const [unitsA, unitsB] = [framesOf(a), framesOf(b)];
  let agreeing = 0;
  const links = a.map(({ start, duration }) => {
    const from = Math.round(start / FRAME_MS);
    const to = Math.min(from + Math.round(duration / FRAME_MS), first.length);
    let [same, cells, like] = [0, 0, 0];
    for (let i = from; i < to; i++) {
      let hit = false;
      for (let j = first[i]; j <= last[i]; j++) {
        cells++;
        if (unitsA[i] === unitsB[j]) {
          same++;
          hit = true;
        }
      }
      agreeing += hit;
      like += likeness[i];
    }
    const units = [...new Set(unitsB.slice(first[from], last[to - 1] + 1))];
    return {
      start: first[from] * FRAME_MS,
      end: (last[to - 1] + 1) * FRAME_MS,
      same: same / cells,
      likeness: like / (to - from),
      units,
    };
  });
  return { links, agreeing: agreeing / unitsA.length };
}

/** As much of a text as there is room for. */
function shortened(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  let length = text.length;
  while (length && context.measureText(`${text.slice(0, length)}…`).width > width) length--;
  return `${text.slice(0, length)}…`;
}

/** The two rows and the ribbons between them. */
export class Links extends Panel {
  constructor(scroller, readout) {
    super(scroller, 242);
    this.links = [];
    this.others = [];
    this.names = [];
    this.onChange = (segment, index) => this.tell(readout, segment, index);
    this.readout = readout;
  }

  showPair(names, a, b, links, duration) {
    this.names = names;
    this.others = b;
    this.links = links;
    this.chosen = this.hovered = -1;
    this.show(a, duration);
    this.tell(this.readout, null, -1);
  }

  paint(context, { width, offset, pixels, x }) {
    const current = this.current;
    const link = this.links[current];
    this.links.forEach((other, index) => {
      if (index !== current) this.paintRibbon(context, index, x, width, current >= 0);
    });
    if (link) this.paintRibbon(context, current, x, width, false, true);
    drawSegments(context, this.segments, x, width, A.top, A.height, current, (_, i) => current >= 0 && i !== current);
    const apart = ({ start, duration }) => link && (start + duration <= link.start || start >= link.end);
    drawSegments(context, this.others, x, width, B.top, B.height, -1, apart);
    if (link) {
      context.strokeStyle = style("--ink");
      context.lineWidth = 2;
      context.beginPath();
      context.roundRect(x(link.start), B.top - 2, x(link.end) - x(link.start) - 1, B.height + 4, 4);
      context.stroke();
    }
    drawAxis(context, pixels, offset, width, this.duration, AXIS);
    context.font = "600 12px system-ui, sans-serif";
    context.fillStyle = style("--quiet");
    context.fillText(shortened(context, `A  ${this.names[0] ?? ""}`, width), 0, A.name);
    context.fillText(shortened(context, `B  ${this.names[1] ?? ""}`, width), 0, B.name);
  }

  paintRibbon(context, index, x, width, faint, strong = false) {
    const { unit, start, duration } = this.segments[index];
    const link = this.links[index];
    const [a0, a1, b0, b1] = [x(start), x(start + duration) - 1, x(link.start), x(link.end) - 1];
    if (Math.max(a1, b1) < 0 || Math.min(a0, b0) > width) return;
    const [top, bottom] = [A.top + A.height + 3, B.top - 3];
    const middle = (top + bottom) / 2;
    context.beginPath();
    context.moveTo(a0, top);
    context.lineTo(a1, top);
    context.bezierCurveTo(a1, middle, b1, middle, b1, bottom);
    context.lineTo(b0, bottom);
    context.bezierCurveTo(b0, middle, a0, middle, a0, top);
    // The same unit on both sides is told by its colour, other units by none.
    context.globalAlpha = (link.same ? 0.25 + 0.6 * link.same : 0.35) * (faint ? 0.25 : 1);
    context.fillStyle = link.same ? colourOf(unit) : style("--ribbon");
    context.fill();
    context.globalAlpha = 1;
    if (strong) {
      context.strokeStyle = style("--ink");
      context.lineWidth = 1;
      context.stroke();
    }
  }

  words(segment, index) {
    const { start, end, units, likeness } = this.links[index];
    const other = units.length === 1 ? `unit ${units[0]}` : `units ${units.join(", ")}`;
    const like = `similarity ${likeness.toFixed(2)}`;
    return `A: ${describe(segment)} — B: ${other}, from ${seconds(start)} to ${seconds(end)} s, ${like}`;
  }

  tell(readout, segment, index) {
    readout.textContent = segment
      ? this.words(segment, index)
      : "Point at a segment of A, or use the arrow keys, to see where B sounds most like it.";
  }
}

let worker;
let running = Promise.resolve();

/** One alignment after the other: a worker's answers have no names. */
function alignInWorker(message) {
  running = running.catch(() => {}).then(
    () =>
      new Promise((resolve, reject) => {
        worker ??= new Worker(new URL("align.js", import.meta.url), { type: "module" });
        worker.onmessage = ({ data }) => resolve(data);
        worker.onerror = () => reject(new Error("comparison: found this browser unable to run it"));
        worker.postMessage(message);
      }),
  );
  return running;
}

/** Everything the comparison of two recordings shows. */
export async function compare(first, second, model) {
  for (const recording of [first, second]) {
    recording.frames ??= await askFrames(recording.sent, model, MOST_SECONDS);
  }
  const [{ frames, dim }, other] = [first.frames, second.frames];
  const a = within(first.segments, frames.length / dim);
  const b = within(second.segments, other.frames.length / dim);
  const [unitsA, unitsB] = [a, b].map((segments) => segments.map(({ unit }) => unit));
  const found = await alignInWorker({ a: frames, b: other.frames, dim, unitsA, unitsB });
  const [setA, setB] = [new Set(unitsA), new Set(unitsB)];
  const common = [...setA].filter((unit) => setB.has(unit)).length;
  return {
    a,
    b,
    ...found,
    ...relate(a, b, found),
    common,
    either: setA.size + setB.size - common,
    longest: Math.max(unitsA.length, unitsB.length),
    cut: Math.max(first.seconds, second.seconds) > MOST_SECONDS,
  };
}
