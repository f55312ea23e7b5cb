/** Runs on the browser's audio thread: hands the microphone's samples to the page, some thousand at a time. */

const BLOCK = 2048;

class Capture extends AudioWorkletProcessor {
  constructor() {
    super();
    this.block = new Float32Array(BLOCK);
    this.filled = 0;
    this.running = true;
    this.port.onmessage = () => {
      this.running = false;
      this.port.postMessage(this.block.slice(0, this.filled));
      this.port.postMessage(null);
    };
  }

  process([[samples]]) {
    for (let at = 0; this.running && samples && at < samples.length; ) {
      const count = Math.min(samples.length - at, BLOCK - this.filled);
      this.block.set(samples.subarray(at, at + count), this.filled);
      at += count;
      this.filled += count;
      if (this.filled === BLOCK) {
        this.port.postMessage(this.block.slice());
        this.filled = 0;
      }
    }
    return this.running;
  }
}

registerProcessor("capture", Capture);
