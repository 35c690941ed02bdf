// A program (docs/program.md) in WebAssembly: no dependency, no network, no DOM, so it also runs in Node and in a worker.

const ERROR_BYTES = 512;

export class Program {
  // Compile the runtime and open a program; both are an ArrayBuffer. Throws an Error that says what is wrong with them.
  static async open(runtime, program) {
    const clock = () => 28;  // the runtime asks no clock in a page; 28 is WASI's "invalid"
    const {instance} = await WebAssembly.instantiate(runtime, {wasi_snapshot_preview1: {clock_time_get: clock}});
    return new Program(instance.exports, new Uint8Array(program));
  }

  constructor(library, bytes) {
    this.library = library;
    library._initialize();
    this.bytes = bytes.length;
    this.error = this.allocate(ERROR_BYTES);
    this.small = this.allocate(64);  // sizes and addresses of one call
    const file = this.allocate(bytes.length);
    this.memory(Uint8Array, file, bytes.length).set(bytes);
    this.handle = this.checked(library.el_open_memory(file, bytes.length, 1, this.error, ERROR_BYTES));
    if (library.el_inputs(this.handle) !== 1) throw new Error('found several inputs, expected one');
    const text = library.el_metadata(this.handle, this.small) >>> 0;
    this.metadata = text ? JSON.parse(this.text(text, this.memory(Uint32Array, this.small, 1)[0])) : {};
    library.el_input(this.handle, 0, this.small, this.small + 4, this.small + 8);
    [this.channels, this.height, this.width] = this.memory(Int32Array, this.small, 3);  // a height of 0: any
    this.ready = new Map();
  }

  // Run images (n, height, width, channels) float32, as many as fit; give the logits, (n, classes) float32.
  run(images, size = this.size) {
    const [height, width] = size, n = images.length / (height * width * this.channels);
    if (!Number.isInteger(n) || n < 1)
      throw new Error(`found ${images.length} numbers, expected images of ${height} x ${width} x ${this.channels}`);
    const ready = this.makeReady(n, height, width);
    this.memory(Float32Array, ready.image, images.length).set(images);
    this.memory(Uint32Array, this.small, 2).set([ready.image, ready.output]);
    const start = performance.now();
    if (this.library.el_run_ready(ready.handle, this.small, this.small + 4)) throw new Error('there is no memory to run it');
    this.milliseconds = performance.now() - start;
    return this.memory(Float32Array, ready.output, ready.floats).slice();
  }

  // [height, width] of images, unless the caller says another.
  get size() {
    return this.height ? [this.height, this.width] : this.metadata.preprocess.size;
  }

  makeReady(n, height, width) {
    const key = [n, height, width].join();
    if (this.ready.has(key)) return this.ready.get(key);
    if (this.library.el_outputs(this.handle) !== 1) throw new Error('found several outputs, expected one');
    this.memory(BigInt64Array, this.small, 4).set([n, height, width, this.channels].map(BigInt));
    this.checked(!this.library.el_shapes(this.handle, this.small, this.small + 32, this.error, ERROR_BYTES));
    const [, h, w, c] = Array.from(this.memory(BigInt64Array, this.small + 32, 4), Number), floats = n * c;
    if (h !== 1 || w !== 1) throw new Error(`found an output of ${h} x ${w} pixels, expected one row of classes`);
    const handle = this.checked(this.library.el_make_ready(this.handle, this.small, 1, this.error, ERROR_BYTES));
    const ready = {
      handle, floats, image: this.allocate(4 * n * height * width * this.channels), output: this.allocate(4 * floats)};
    this.ready.set(key, ready);
    return ready;
  }

  allocate(bytes) {
    // Beyond 2 GB an address is a negative number, unless it is said to have no sign; beyond 4 GB there is none.
    const at = bytes < 2 ** 32 ? this.library.el_aligned_alloc(64, bytes) >>> 0 : 0;
    if (!at) throw new Error(`there is no memory for ${bytes} bytes`);
    return at;
  }

  // A view that the next allocation may end: memory that grows is another buffer.
  memory(type, at, length) {
    return new type(this.library.memory.buffer, at, length);
  }

  text(at, bytes) {
    return new TextDecoder().decode(this.memory(Uint8Array, at, bytes));
  }

  checked(result) {
    if (result) return result >>> 0;
    const text = this.text(this.error, ERROR_BYTES);
    throw new Error(text.slice(0, text.indexOf('\0')));
  }
}
