/** Sound in the browser: what the server is given is 16 kHz, one channel, 16 bits. */

export const RATE = 16000;
const ZEROS = 24; // zero crossings of the filter on either side: the stop band is then below 16 bits' noise
const PASS = 0.92; // of the band, so that the filter has room to fall

function commonDivisor(a, b) {
  return b ? commonDivisor(b, a % b) : a;
}

/** Changes the rate of samples that come piece by piece, by a windowed sinc for each of the few positions there are. */
export class Resampler {
  constructor(from, to = RATE) {
    const common = commonDivisor(from, to);
    this.up = to / common;
    this.down = from / common;
    this.same = from === to;
    const cutoff = PASS * Math.min(1, to / from);
    this.half = Math.ceil(ZEROS / cutoff);
    this.weights = new Float32Array(this.up * 2 * this.half);
    for (let phase = 0; phase < this.up; phase++) {
      const row = this.weights.subarray(phase * 2 * this.half, (phase + 1) * 2 * this.half);
      let sum = 0;
      for (let k = 0; k < row.length; k++) {
        const x = k - this.half + 1 - phase / this.up;
        const angle = Math.PI * cutoff * x;
        const window = 0.42 + 0.5 * Math.cos((Math.PI * x) / this.half) + 0.08 * Math.cos((2 * Math.PI * x) / this.half);
        row[k] = (angle ? Math.sin(angle) / angle : 1) * (Math.abs(x) < this.half ? window : 0);
        sum += row[k];
      }
      for (let k = 0; k < row.length; k++) row[k] /= sum;
    }
    this.held = new Float32Array(this.half - 1); // silence before the first sample
    this.position = 0; // of the next output, in input samples times `up`, from the first held one's window
    this.taken = 0;
    this.given = 0;
  }

  feed(samples) {
    if (this.same) return samples;
    this.taken += samples.length;
    const input = new Float32Array(this.held.length + samples.length);
    input.set(this.held);
    input.set(samples, this.held.length);
    const width = 2 * this.half;
    const output = [];
    let at = Math.floor(this.position / this.up);
    while (at + width <= input.length) {
      const row = (this.position % this.up) * width;
      let sum = 0;
      for (let k = 0; k < width; k++) sum += this.weights[row + k] * input[at + k];
      output.push(sum);
      this.position += this.down;
      at = Math.floor(this.position / this.up);
    }
    const used = Math.min(at, input.length);
    this.held = input.slice(used);
    this.position -= used * this.up;
    this.given += output.length;
    return Float32Array.from(output);
  }

  /** What silence after the last sample brings out. */
  finish() {
    if (this.same) return new Float32Array(0);
    const wanted = Math.round((this.taken * this.up) / this.down);
    const rest = wanted - this.given;
    return this.feed(new Float32Array(2 * this.half + this.down)).slice(0, Math.max(0, rest));
  }
}

/** Float samples as 16-bit ones. */
export function toPcm(samples) {
  return Int16Array.from(samples, (x) => Math.round(32767 * Math.max(-1, Math.min(1, x))));
}

/** 16-bit samples at 16 kHz as a WAV file. */
export function toWav(pcm) {
  const head = new DataView(new ArrayBuffer(44));
  const write = (at, text) => [...text].forEach((c, i) => head.setUint8(at + i, c.charCodeAt(0)));
  write(0, "RIFF");
  head.setUint32(4, 36 + 2 * pcm.length, true);
  write(8, "WAVEfmt ");
  head.setUint32(16, 16, true);
  head.setUint16(20, 1, true);
  head.setUint16(22, 1, true);
  head.setUint32(24, RATE, true);
  head.setUint32(28, 2 * RATE, true);
  head.setUint16(32, 2, true);
  head.setUint16(34, 16, true);
  write(36, "data");
  head.setUint32(40, 2 * pcm.length, true);
  return new Blob([head, pcm], { type: "audio/wav" });
}

export function joined(parts, Kind) {
  const whole = new Kind(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

/** A file's samples, mixed to one channel at 16 kHz; null where this browser cannot read it. */
export async function decode(blob) {
  try {
    const buffer = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(await blob.arrayBuffer());
    const mono = buffer.getChannelData(0).slice();
    for (let channel = 1; channel < buffer.numberOfChannels; channel++) {
      const other = buffer.getChannelData(channel);
      for (let i = 0; i < mono.length; i++) mono[i] += other[i];
    }
    if (buffer.numberOfChannels > 1) for (let i = 0; i < mono.length; i++) mono[i] /= buffer.numberOfChannels;
    return mono;
  } catch {
    return null;
  }
}

/** Listens to the microphone until told to stop; `onPcm` gets 16-bit samples at 16 kHz as they come. */
export class Microphone {
  static async open(onPcm) {
    if (!navigator.mediaDevices) {
      throw new Error("microphone: found none, wanted https or localhost: browsers give one to no other page");
    }
    const microphone = new Microphone();
    try {
      // As it sounds: what a browser does to please the ear is not what a model was trained on.
      const plain = { echoCancellation: false, noiseSuppression: false, autoGainControl: false, channelCount: 1 };
      microphone.stream = await navigator.mediaDevices.getUserMedia({ audio: plain });
      microphone.context = new AudioContext();
      await microphone.context.audioWorklet.addModule(new URL("capture.js", import.meta.url));
    } catch (error) {
      microphone.release();
      const found = error.name === "NotAllowedError" ? "it not allowed" : error.name === "NotFoundError" ? "none" : error.name;
      throw new Error(`microphone: found ${found}, wanted one: allow it for this page, or choose a file`);
    }
    const { context } = microphone;
    const resampler = new Resampler(context.sampleRate);
    microphone.node = new AudioWorkletNode(context, "capture", { channelCount: 1, channelCountMode: "explicit" });
    microphone.ended = new Promise((resolve) => {
      microphone.node.port.onmessage = ({ data }) => {
        onPcm(toPcm(data ? resampler.feed(data) : resampler.finish()));
        if (!data) resolve();
      };
    });
    context.createMediaStreamSource(microphone.stream).connect(microphone.node);
    microphone.node.connect(context.destination); // silence; a node that leads nowhere may not be run
    await context.resume();
    return microphone;
  }

  async stop() {
    this.node.port.postMessage("stop");
    await this.ended;
    this.release();
  }

  release() {
    this.stream?.getTracks().forEach((track) => track.stop());
    this.context?.close();
  }
}
