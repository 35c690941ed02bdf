// The page: a picture, dropped, chosen or the camera's, becomes numbers as the program's metadata says, and labels.
import {Program} from './program.js';

const TOP = 5;
const SHOWN = 480;  // pixels of the picture that is shown, at least
const CAMERA_TEXTS = {
  NotFoundError: 'found no camera', NotAllowedError: 'the camera was refused; allow it in the browser',
  NotReadableError: 'the camera is in use elsewhere'};
const at = (id) => document.getElementById(id);

const hidden = document.createElement('canvas');

let program = null;
let camera = null;  // the stream that is shown
let wishes = 0;       // what the user asked for, counted: a stream or picture that comes late is dropped

async function fetched(path) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`${path}: the server says ${response.status} ${response.statusText}`);
  return response.arrayBuffer();
}

// Where a picture of this width and height goes on a canvas of the network's size: [x, y, width, height].
function place(width, height) {
  const {crop_mode: mode, crop_pct: share} = program.metadata.preprocess;
  const [h, w] = program.size, ratios = [Math.floor(w / share) / width, Math.floor(h / share) / height];
  const ratio = mode === 'border' ? Math.min(...ratios) : Math.max(...ratios);
  const [byWidth, byHeight] = mode === 'squash' ? ratios : [ratio, ratio];
  const [drawnWidth, drawnHeight] = [Math.round(width * byWidth), Math.round(height * byHeight)];
  return [Math.round((w - drawnWidth) / 2), Math.round((h - drawnHeight) / 2), drawnWidth, drawnHeight];
}

// Draw a picture as the network sees it, on a canvas that is `zoom` times as large.
function draw(canvas, zoom, picture, width, height) {
  const {mean, interpolation} = program.metadata.preprocess, [h, w] = program.size;
  if (canvas.width !== zoom * w || canvas.height !== zoom * h) [canvas.width, canvas.height] = [zoom * w, zoom * h];
  const context = canvas.getContext('2d', {willReadFrequently: true});
  [context.imageSmoothingEnabled, context.imageSmoothingQuality] = [interpolation !== 'nearest', 'high'];
  context.fillStyle = `rgb(${[0, 1, 2].map((i) => 255 * mean[i % mean.length]).join(' ')})`;
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(picture, ...place(width, height).map((n) => zoom * n));
  return context;
}

// The numbers of a picture, (height, width, channels) float32.
function numbers(picture, width, height) {
  const {mean, std} = program.metadata.preprocess, [h, w] = program.size, c = program.channels, round = Math.fround;
  const {data} = draw(hidden, 1, picture, width, height).getImageData(0, 0, w, h), values = new Float32Array(h * w * c);
  for (let i = 0, pixel = 0; i < values.length; pixel += 4)
    for (let k = 0; k < c; k++, i++) {
      const byte = c === 1 ? .299 * data[pixel] + .587 * data[pixel + 1] + .114 * data[pixel + 2] : data[pixel + k];
      values[i] = round(round(byte / 255) - round(mean[k])) / round(std[k]);
    }
  return values;
}

function probabilities(logits) {
  const most = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const powers = Array.from(logits, (logit) => Math.exp(logit - most)), sum = powers.reduce((a, b) => a + b);
  return powers.map((power) => power / sum);
}

function show(shares) {
  const {labels} = program.metadata;
  const best = shares.map((share, i) => ({share, label: labels?.[i] ?? `class ${i}`})).sort((a, b) => b.share - a.share);
  at('labels').replaceChildren(...best.slice(0, TOP).map(({label, share}) => {
    const [row, name, text, bar] = ['li', 'span', 'span', 'meter'].map((tag) => document.createElement(tag));
    [name.className, name.textContent] = ['label', label];
    [text.className, text.textContent] = ['share', `${(100 * share).toFixed(1)} %`];
    [bar.value, bar.ariaLabel] = [share, label];
    row.append(name, text, bar);
    return row;
  }));
  at('time').textContent = `${program.milliseconds.toFixed(1)} ms an image`;
}

function classify(picture, width, height) {
  const logits = program.run(numbers(picture, width, height)), [h, w] = program.size;
  draw(at('seen'), Math.ceil(SHOWN / Math.max(h, w)), picture, width, height);
  at('drop').classList.add('full');
  show(probabilities(logits));
}

async function classifyBlob(blob) {
  const wish = wishes;
  let picture;
  try {
    picture = await createImageBitmap(blob);
  } catch {
    throw new Error(`${blob.name ?? 'this'} is no picture that the browser reads${blob.type && ` (${blob.type})`}`);
  }
  if (wish === wishes) classify(picture, picture.width, picture.height);
  picture.close();
}

function stopCamera() {
  wishes++;
  camera?.getTracks().forEach((track) => track.stop());
  camera = null;
  at('camera').ariaPressed = 'false';
  at('camera').textContent = 'Use the camera';
}

async function startCamera() {
  if (!navigator.mediaDevices) throw new Error('the browser lends its camera to https and localhost only');
  const wish = ++wishes;
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({video: {facingMode: 'environment'}});
  } catch (error) {
    throw new Error(CAMERA_TEXTS[error.name] ?? `the camera does not start (${error.message})`);
  }
  if (wish !== wishes) return stream.getTracks().forEach((track) => track.stop());  // asked for something else since
  camera = stream;
  at('camera').ariaPressed = 'true';
  at('camera').textContent = 'Stop the camera';
  const video = document.createElement('video');
  [video.srcObject, video.muted, video.playsInline] = [stream, true, true];
  await video.play();
  const next = () => {
    if (camera !== stream) return;
    guarded(() => classify(video, video.videoWidth, video.videoHeight));
    setTimeout(() => requestAnimationFrame(next));  // buttons have their turn
  };
  next();
}

// Do something; what it throws is shown as text.
async function guarded(action) {
  at('error').hidden = true;
  try {
    await action();
  } catch (error) {
    stopCamera();
    at('error').textContent = error.message;
    at('error').hidden = false;
  }
}

function take(blob) {
  stopCamera();
  if (blob) guarded(() => classifyBlob(blob));
}

function listen() {
  const drop = at('drop');
  at('file').addEventListener('change', ({target}) => { take(target.files[0]); target.value = ''; });
  at('camera').addEventListener('click', () => camera ? stopCamera() : guarded(startCamera));
  for (const type of ['dragover', 'dragleave', 'drop'])
    document.addEventListener(type, (event) => { event.preventDefault(); drop.classList.toggle('over', type === 'dragover'); });
  document.addEventListener('drop', ({dataTransfer}) => guarded(() => {
    if (!dataTransfer.files.length) throw new Error('found no file, expected a picture: save it first, and drop the file');
    take(dataTransfer.files[0]);
  }));
}

async function open() {
  at('about').textContent = 'Loading the network';
  program = await Program.open(...await Promise.all([fetched('runtime.wasm'), fetched('net.program')]));
  const {name, preprocess} = program.metadata;
  if (![1, 3].includes(program.channels) || !preprocess)
    throw new Error(`found a program for ${program.channels} channels, expected one for pictures, of 1 or 3`);
  const [h, w] = program.size;
  at('name').textContent = document.title = name;
  at('about').textContent = `${(program.bytes / 1e6).toFixed(1)} MB, pictures of ${w} x ${h} pixels`;
  program.run(new Float32Array(h * w * program.channels));  // the browser compiles what runs
  window.timmEl = {program, run: (images, size) => program.run(images, size)};
  listen();
  const picture = new URLSearchParams(location.search).get('image');
  if (picture) await classifyBlob(new Blob([await fetched(picture)]));
}

await guarded(open);
if (!program) at('about').textContent = '';
document.body.dataset.state = at('error').hidden ? 'ready' : 'failed';
