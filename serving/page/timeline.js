/** Drawing: units in colour on a time axis. */

const MIN_PIXELS = 240; // a second at first, so that units can be told apart
const MAX_PIXELS = 1200;
const BLOCK = 32; // samples to one peak
const LABEL = "600 11px system-ui, sans-serif";
const INK = "#14201f"; // on every colour of colourOf

/** The colour of a unit, the same wherever it is heard: neighbours in number lie far apart in hue. */
export function colourOf(unit) {
  const hue = (unit * 137.508 + 25) % 360;
  return `oklch(${[0.78, 0.7, 0.85][unit % 3]} ${[0.12, 0.13, 0.1][unit % 3]} ${hue.toFixed(1)})`;
}

/** Milliseconds as a person reads seconds. */
export function seconds(ms, digits = 2) {
  return (ms / 1000).toFixed(digits);
}

/** Runs of equal units: [{unit, start, duration}], milliseconds. */
export function segmentsOf(units, durations, start = 0) {
  let at = start;
  return units.map((unit, i) => {
    const segment = { unit, start: at, duration: durations[i] };
    at += durations[i];
    return segment;
  });
}

/** Lowest and highest sample of each block of a wave that may come piece by piece. */
export class Peaks {
  constructor() {
    this.values = new Float32Array(2048);
    this.samples = 0;
    this.loudest = 0;
  }

  get count() {
    return Math.ceil(this.samples / BLOCK);
  }

  add(wave) {
    const scale = wave instanceof Int16Array ? 1 / 32768 : 1;
    const needed = 2 * Math.ceil((this.samples + wave.length) / BLOCK);
    if (needed > this.values.length) {
      const larger = new Float32Array(2 * needed);
      larger.set(this.values);
      this.values = larger;
    }
    for (let i = 0; i < wave.length; i++, this.samples++) {
      const at = 2 * Math.floor(this.samples / BLOCK);
      const value = scale * wave[i];
      if (value < this.values[at]) this.values[at] = value;
      if (value > this.values[at + 1]) this.values[at + 1] = value;
      if (Math.abs(value) > this.loudest) this.loudest = Math.abs(value);
    }
  }
}

/** The segment at a time, or -1; segments lie in order and without gaps. */
export function segmentAt(segments, ms) {
  let [low, high] = [0, segments.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (segments[middle].start <= ms) low = middle + 1;
    else high = middle;
  }
  const found = segments[low - 1];
  return found && ms < found.start + found.duration ? low - 1 : -1;
}

/** What a segment is, in words. */
export function describe({ unit, start, duration }) {
  return `unit ${unit}, ${duration} ms, from ${seconds(start)} to ${seconds(start + duration)} s`;
}

export function style(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** A canvas that is as sharp as the screen: its context, in CSS pixels. */
export function prepare(canvas, width, height) {
  const scale = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

/** One row of segments. x(ms): where a time lies; faint(segment): whether it steps back. */
export function drawSegments(context, segments, x, width, top, height, chosen, faint) {
  context.font = LABEL;
  context.textAlign = "center";
  context.textBaseline = "middle";
  segments.forEach((segment, index) => {
    const left = x(segment.start);
    const right = x(segment.start + segment.duration);
    if (right < 0 || left > width) return;
    context.globalAlpha = faint(segment, index) ? 0.4 : 1;
    context.fillStyle = colourOf(segment.unit);
    const gap = right - left > 6 ? 1 : 0;
    context.beginPath();
    context.roundRect(left, top, right - left - gap, height, gap ? 3 : 0);
    context.fill();
    const label = String(segment.unit);
    if (right - left > 7 * label.length + 6) {
      context.fillStyle = INK;
      context.fillText(label, (left + right - gap) / 2, top + height / 2 + 0.5);
    }
    context.globalAlpha = 1;
    if (index === chosen) {
      context.strokeStyle = style("--ink");
      context.lineWidth = 2;
      context.beginPath();
      context.roundRect(left + 0.5, top - 2, Math.max(right - left - gap - 1, 2), height + 4, 4);
      context.stroke();
    }
  });
}

/** Marks of time along the lower edge. */
export function drawAxis(context, pixels, offset, width, total, top) {
  const step = [0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60].find((wanted) => wanted * pixels >= 64) ?? 300;
  context.font = "11px system-ui, sans-serif";
  context.textAlign = "left";
  context.textBaseline = "top";
  context.fillStyle = style("--quiet");
  for (let k = Math.max(0, Math.floor(offset / pixels / step)); k * step <= total; k++) {
    const x = k * step * pixels - offset;
    if (x > width) break;
    context.fillRect(Math.round(x), top, 1, 5);
    const text = k * step === 0 ? "0 s" : `${Number((k * step).toFixed(1))}`;
    if (k * step * pixels < total * pixels - 18) context.fillText(text, Math.round(x) + 4, top + 2);
  }
}

/**
 * A panel that scrolls sideways over more time than it shows, draws what is in view, and lets a pointer or the arrow
 * keys choose one of `segments`. A subclass has height and paint(context, view).
 */
export class Panel {
  constructor(scroller, height) {
    this.scroller = scroller;
    this.track = scroller.querySelector(".track");
    this.canvas = scroller.querySelector("canvas");
    this.height = height;
    this.segments = [];
    this.duration = 0;
    this.zoom = 1;
    this.chosen = -1;
    this.hovered = -1;
    this.onChange = () => {};
    this.onPick = () => {};
    this.track.style.height = `${height}px`;
    new ResizeObserver(() => this.layout()).observe(scroller);
    scroller.addEventListener("scroll", () => this.draw(), { passive: true });
    scroller.addEventListener("pointermove", (event) => this.hover(this.segmentUnder(event)));
    scroller.addEventListener("pointerleave", () => this.hover(-1));
    scroller.addEventListener("click", (event) => {
      this.choose(this.segmentUnder(event));
      this.onPick(this.timeUnder(event));
    });
    scroller.addEventListener("keydown", (event) => this.key(event));
    scroller.addEventListener("blur", () => this.choose(-1));
    scroller.setAttribute("aria-valuemin", "0");
  }

  /** Pixels a second. */
  get pixels() {
    return Math.min(Math.max(this.fitting, MIN_PIXELS), MAX_PIXELS) * this.zoom;
  }

  /** Pixels a second at which all of it is in view. */
  get fitting() {
    return (this.scroller.clientWidth - 1) / Math.max(this.duration, 0.5);
  }

  get current() {
    return this.hovered >= 0 ? this.hovered : this.chosen;
  }

  show(segments, duration) {
    this.segments = segments;
    this.duration = duration;
    if (this.chosen >= segments.length) this.chosen = -1;
    this.scroller.setAttribute("aria-valuemax", String(Math.max(segments.length - 1, 0)));
    this.announce();
    this.layout();
  }

  magnify(factor) {
    const middle = (this.scroller.scrollLeft + this.scroller.clientWidth / 2) / this.pixels;
    const least = Math.min(this.fitting / (this.pixels / this.zoom), 1);
    this.zoom = Math.min(Math.max(this.zoom * factor, least), 16);
    this.layout();
    this.scroller.scrollLeft = middle * this.pixels - this.scroller.clientWidth / 2;
  }

  layout() {
    const width = this.duration * this.pixels;
    this.track.style.width = `${Math.max(Math.floor(width), this.scroller.clientWidth)}px`;
    this.draw();
  }

  draw() {
    const width = this.scroller.clientWidth;
    if (!width) return;
    const offset = this.scroller.scrollLeft;
    const context = prepare(this.canvas, width, this.height);
    const pixels = this.pixels;
    this.paint(context, { width, offset, pixels, x: (ms) => (ms / 1000) * pixels - offset });
  }

  timeUnder(event) {
    const x = event.clientX - this.scroller.getBoundingClientRect().left + this.scroller.scrollLeft;
    return (1000 * x) / this.pixels;
  }

  segmentUnder(event) {
    return segmentAt(this.segments, this.timeUnder(event));
  }

  hover(index) {
    if (index === this.hovered) return;
    this.hovered = index;
    this.changed();
  }

  choose(index) {
    if (index === this.chosen) return;
    this.chosen = index;
    if (index >= 0) this.reveal(this.segments[index]);
    this.announce();
    this.changed();
  }

  changed() {
    this.draw();
    this.onChange(this.current >= 0 ? this.segments[this.current] : null, this.current);
  }

  announce() {
    const segment = this.segments[this.chosen];
    this.scroller.setAttribute("aria-valuenow", String(Math.max(this.chosen, 0)));
    this.scroller.setAttribute("aria-valuetext", segment ? this.words(segment, this.chosen) : `${this.segments.length} segments`);
  }

  words(segment) {
    return describe(segment);
  }

  reveal({ start, duration }) {
    const [left, right] = [(start / 1000) * this.pixels, ((start + duration) / 1000) * this.pixels];
    const room = this.scroller.clientWidth;
    if (left < this.scroller.scrollLeft) this.scroller.scrollLeft = left - 0.2 * room;
    else if (right > this.scroller.scrollLeft + room) this.scroller.scrollLeft = right - 0.8 * room;
  }

  key(event) {
    const last = this.segments.length - 1;
    const to = {
      ArrowRight: Math.min(this.chosen + 1, last),
      ArrowLeft: Math.max(this.chosen - 1, 0),
      Home: 0,
      End: last,
      Escape: -1,
    }[event.key];
    if (to === undefined || last < 0) return;
    event.preventDefault();
    this.hovered = -1;
    this.choose(to);
  }
}

const timelines = new Set();
let marked = null; // the unit that is pointed at: other units step back wherever they are drawn

/** Let a unit stand out in all timelines, or none. */
export function mark(unit) {
  if (unit === marked) return;
  marked = unit;
  for (const timeline of timelines) timeline.draw();
}

export function redraw() {
  for (const timeline of timelines) timeline.draw();
}

const WAVE = { top: 6, height: 72 };
const STRIP = { top: 88, height: 34 };
const AXIS = 128;

/** A recording's waveform, its units below it, and a cursor. */
export class Timeline extends Panel {
  constructor(scroller) {
    super(scroller, 148);
    this.cursor = scroller.querySelector(".cursor");
    this.peaks = new Peaks();
    timelines.add(this);
  }

  remove() {
    timelines.delete(this);
  }

  paint(context, { width, offset, pixels, x }) {
    this.paintWave(context, width, offset, pixels);
    const faint = ({ unit }) => marked !== null && unit !== marked;
    drawSegments(context, this.segments, x, width, STRIP.top, STRIP.height, this.current, faint);
    drawAxis(context, pixels, offset, width, this.duration, AXIS);
  }

  paintWave(context, width, offset, pixels) {
    const middle = WAVE.top + WAVE.height / 2;
    const perPixel = 16000 / BLOCK / pixels;
    const { values, count, loudest } = this.peaks;
    const scale = WAVE.height / 2 / Math.max(loudest, 0.05);
    context.fillStyle = style("--line");
    context.fillRect(0, middle, Math.min(width, this.duration * pixels - offset), 1);
    context.fillStyle = style("--wave");
    const step = 1 / (window.devicePixelRatio || 1);
    for (let px = 0; px < width; px += step) {
      const from = Math.floor((px + offset) * perPixel);
      const to = Math.max(from + 1, Math.floor((px + step + offset) * perPixel));
      if (from >= count) break;
      let [low, high] = [0, 0];
      for (let block = from; block < Math.min(to, count); block++) {
        low = Math.min(low, values[2 * block]);
        high = Math.max(high, values[2 * block + 1]);
      }
      context.fillRect(px, middle - high * scale, step, Math.max((high - low) * scale, step));
    }
  }

  /** Put the cursor at a time in seconds and keep it in view; null hides it. */
  point(time) {
    this.cursor.hidden = time === null;
    if (time === null) return;
    const x = time * this.pixels;
    this.cursor.style.transform = `translateX(${x}px)`;
    const { scrollLeft, clientWidth } = this.scroller;
    if (x < scrollLeft || x > scrollLeft + clientWidth - 24) this.scroller.scrollLeft = x - 0.15 * clientWidth;
  }
}
