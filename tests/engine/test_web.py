"""The exported web page: what is in its folder, and, with Zig and Chromium, what it computes, shows and says of faults.

In the browser a script is added to the page, which sends what it found to the test's own server.
"""
import functools
import http.server
import json
import queue
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import randomise
from PIL import Image

from timm_el.engine import abi, deploy, read_program
from timm_el.engine.web import web_runtime, write_web_page

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'build_tools'))
from el_compile import compile_web_runtime  # noqa: E402

PAGE = ['app.js', 'index.html', 'program.js', 'style.css']
CAMERA = ['--use-fake-ui-for-media-stream', '--use-fake-device-for-media-stream']
MOST_BYTES, MOST_SECONDS = 300_000, 240
TESTER = '''
<script type="module">
  const at = (id) => document.getElementById(id);
  const labels = () => [...document.querySelectorAll('li')].map((li) => li.innerText);
  const until = async (holds) => { while (!holds()) await new Promise((go) => setTimeout(go, 20)); };
  await until(() => document.body.dataset.state);
  const found = await (async () => {SCRIPT})().catch((error) => `${error}`);
  await fetch('found', {method: 'POST', body: JSON.stringify(found)});
</script>
'''


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """The page's files with a runtime that is none, but says that it was built from these sources."""
    folder = tmp_path / 'web'
    shutil.copytree(abi.WEB_RUNTIME.parent, folder)
    monkeypatch.setattr(abi, 'WEB_RUNTIME', folder / 'runtime.wasm')
    abi.WEB_RUNTIME.write_bytes(b'\0asm' + abi.source_hash().encode())
    return abi.WEB_RUNTIME


@pytest.fixture(scope='module')
def runtime(tmp_path_factory):
    """The runtime as Zig builds it, beside the page's files."""
    folder = tmp_path_factory.mktemp('web')
    for name in PAGE:
        shutil.copy(abi.WEB_RUNTIME.with_name(name), folder)
    compile_web_runtime(folder / 'runtime.wasm', tmp_path_factory.mktemp('objects'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(abi, 'WEB_RUNTIME', folder / 'runtime.wasm')
        yield abi.WEB_RUNTIME


def network(name: str, seed: int = 0, **kwargs) -> torch.nn.Module:
    torch.manual_seed(seed)
    return randomise(timm.create_model(name, **kwargs)).eval()


@pytest.fixture(scope='module')
def page(runtime, tmp_path_factory):
    """A folder with the page of a small net of ten classes, and a picture."""
    folder = tmp_path_factory.mktemp('page')
    write_web_page(network('el_mobilenet_v1', num_classes=10), folder, size=(32, 48))
    noise = np.random.RandomState(0).randint(0, 256, (36, 54, 3), dtype=np.uint8)  # 32 x 48 is its share of 0.875
    Image.fromarray(noise).save(folder / 'noise.png')
    return folder


def ask(folder: Path, script: str, *flags: str, query: str = '') -> object:
    """Return what a script, the body of an async function, returns in the page of a folder, in headless Chromium."""
    found = queue.Queue()
    index = (folder / 'index.html').read_text()
    (folder / 'test.html').write_text(index.replace('</body>', TESTER.replace('SCRIPT', script) + '</body>'))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_POST(self):
            found.put(json.loads(self.rfile.read(int(self.headers['Content-Length']))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    chromium = shutil.which('chromium') or shutil.which('google-chrome')
    assert chromium, 'install chromium to prove the page'
    browser = subprocess.Popen(
        [chromium, '--headless', '--no-sandbox', '--disable-gpu', f'--user-data-dir={folder / "profile"}', *flags,
         '--remote-debugging-port=0', f'http://127.0.0.1:{server.server_port}/test.html{query}'],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        return found.get(timeout=MOST_SECONDS)
    finally:
        browser.terminate()
        browser.wait()
        server.shutdown()
        server.server_close()


def test_the_folder_holds_page_runtime_and_program_and_nothing_else(stand_in, tmp_path):
    net = deploy(network('el_resnet18', num_classes=3))
    total = write_web_page(net, tmp_path / 'a' / 'page', size=(32, 32))
    files = sorted((tmp_path / 'a' / 'page').iterdir())
    assert [path.name for path in files] == sorted([*PAGE, 'net.program', 'runtime.wasm'])
    assert total == sum(path.stat().st_size for path in files)
    assert (tmp_path / 'a' / 'page' / 'runtime.wasm').read_bytes() == stand_in.read_bytes()
    program = read_program(tmp_path / 'a' / 'page' / 'net.program')
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(program(x), net(x)) and program.metadata['preprocess']['size'] == [32, 32]
    assert write_web_page(net, tmp_path / 'a' / 'page', size=(32, 32)) == total  # a second time


def test_the_page_asks_no_other_host():
    for name in PAGE:
        assert '://' not in abi.WEB_RUNTIME.with_name(name).read_text(), name


@pytest.mark.parametrize('old', [None, b'\0asm of other sources'])
def test_without_a_runtime_of_these_sources_the_error_says_how_to_get_one(stand_in, tmp_path, old):
    stand_in.unlink()
    if old:
        stand_in.write_bytes(old)
    with pytest.raises(FileNotFoundError, match=r'runtime\.wasm .*(not there|other sources).* `pip install ziglang`'):
        web_runtime()
    with pytest.raises(FileNotFoundError):
        write_web_page(network('el_resnet18'), tmp_path / 'page')
    assert not (tmp_path / 'page').exists()


def test_a_network_that_is_no_program_leaves_no_folder(stand_in, tmp_path):
    net = network('el_resnet18', num_classes=3)
    net.fc = torch.nn.Sequential(net.fc, torch.nn.LogSoftmax(1)).eval()
    with pytest.raises(ValueError, match='no step'):
        write_web_page(net, tmp_path / 'page', size=(32, 32))
    assert not (tmp_path / 'page').exists()


@pytest.mark.slow
def test_the_runtime_is_small(runtime):
    assert web_runtime() == runtime and runtime.stat().st_size < MOST_BYTES


@pytest.mark.slow
@pytest.mark.parametrize('name, size', [
    ('el_mobilenet_v1', 64), ('el_mobilenet_v1', 224), ('el_resnet18', 64), ('el_resnet18', 224),
    ('el_reactnet_c', 64)])
def test_the_page_gives_the_bits_of_the_deployed_network(runtime, tmp_path, name, size):
    net = deploy(network(name))
    write_web_page(net, tmp_path, size=(size, size))
    x = torch.randn(2, 3, size, size)
    x.permute(0, 2, 3, 1).contiguous().numpy().tofile(tmp_path / 'images.bin')
    found = ask(tmp_path, '''
        const images = new Float32Array(await (await fetch('images.bin')).arrayBuffer());
        return [...new Uint32Array((await window.timmEl.run(images)).buffer)];''')
    assert found == net(x).numpy().view(np.uint32).ravel().tolist()


@pytest.mark.slow
def test_the_middle_of_a_picture_is_normalised_and_gives_labels_and_shares(page):
    found = ask(page, '''return {labels: labels(), time: at('time').innerText, error: at('error').innerText};''',
                query='?image=noise.png')
    program = read_program(page / 'net.program')
    how = program.metadata['preprocess']
    assert how['crop_pct'] == 0.875 and how['size'] == [32, 48]
    pixels = np.asarray(Image.open(page / 'noise.png'), dtype=np.float32) / 255
    x = (pixels[2:34, 3:51] - np.float32(how['mean'])) / np.float32(how['std'])
    share, label = program(torch.from_numpy(x).permute(2, 0, 1)[None]).softmax(1)[0].topk(5)
    assert found['labels'] == [f'class {i}\n{100 * p:.1f} %' for i, p in zip(label.tolist(), share.tolist())]
    assert found['time'].endswith(' ms an image') and not found['error']


@pytest.mark.slow
def test_the_camera_is_shown_and_its_lack_is_said(page):
    script = '''
        at('camera').click();
        await until(() => labels().length || !at('error').hidden);
        const seen = labels().length;
        at('camera').click();
        return [seen, at('error').innerText, at('camera').innerText];'''
    assert ask(page, script, *CAMERA) == [5, '', 'Use the camera']
    assert ask(page, script.replace('''at('camera').click();
        return''', 'return')) == [0, 'found no camera', 'Use the camera']


@pytest.mark.slow
def test_no_camera_stays_on_that_was_asked_for_twice(page):
    assert ask(page, '''
        const streams = [], media = navigator.mediaDevices, lend = media.getUserMedia.bind(media);
        media.getUserMedia = async (what) => { streams.push(await lend(what)); return streams.at(-1); };
        at('camera').click();
        at('camera').click();
        await until(() => streams.length === 2 && labels().length);
        at('camera').click();
        return streams.map((stream) => stream.getTracks().every((track) => track.readyState === 'ended'));
        ''', *CAMERA) == [True, True]


@pytest.mark.slow
def test_faults_are_shown_as_text(page, tmp_path):
    text = '''
        const bag = new DataTransfer();
        bag.items.add(new File(['no picture'], 'poem.txt', {type: 'text/plain'}));
        document.dispatchEvent(new DragEvent('drop', {dataTransfer: bag, cancelable: true}));
        await until(() => !at('error').hidden);
        return at('error').innerText;'''
    assert ask(page, text) == 'poem.txt is no picture that the browser reads (text/plain)'
    said = "return [document.body.dataset.state, at('error').innerText];"
    assert ask(page, said, query='?image=none.png') == ['failed', 'none.png: the server says 404 File not found']
    shutil.copytree(page, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns('profile'))
    program = bytearray((page / 'net.program').read_bytes())
    for at, byte, said_of_it in ((8, 2, 'the program has version 2, expected 1'), (-1, 9, 'checksum of tensor')):
        damaged = bytearray(program)
        damaged[at] = byte ^ (damaged[at] if at < 0 else 0)
        (tmp_path / 'net.program').write_bytes(damaged)
        state, error = ask(tmp_path, said)
        assert state == 'failed' and said_of_it in error
