"""Threads: the engine runs on torch's OpenMP team, on a pool of its own in a forked child, and never changes a bit."""
import json
import os
import subprocess
import sys
import textwrap

import pytest

import timm_el

pytestmark = pytest.mark.skipif(
    not timm_el.engine.info()['native'], reason='threads are those of the native library, which is not there')

PROLOGUE = '''
import ctypes, json, os, sys, threading, time
import timm, torch, timm_el

torch.manual_seed(0)
fast = timm_el.deploy(timm.create_model('el_mobilenet_v1', num_classes=10).eval())  # no layer of torch's in it
x = torch.randn(2, 3, 96, 96)

def run(threads):
    torch.set_num_threads(threads)
    with torch.no_grad():
        return fast(x)

def tids():
    return set(os.listdir('/proc/self/task'))

def status_of(child):
    for _ in range(600):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.1)
    os.kill(child, 9)
    return 'the child hangs'

one = run(1)
'''


def run(code: str, timeout: int = 300, **variables: str) -> list:
    """Lines of JSON that a fresh process prints."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(('OMP_', 'GOMP_', 'KMP_'))}
    result = subprocess.run(
        [sys.executable, '-W', 'error', '-c', PROLOGUE + textwrap.dedent(code)], capture_output=True, text=True,
        timeout=timeout, env={**environment, **variables})
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


FORK = '''
    torch.set_num_threads(2)
    torch.randn(2000, 2000).relu().sum()      # torch's team is there
    in_parent = torch.equal(run(2), one)      # and the engine has run on it
    child = os.fork()
    if child == 0:
        same = torch.equal(run(2), one)
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0 if torch.equal(run(3), one) else 7)
        os._exit(0 if same and os.waitpid(grandchild, 0)[1] == 0 else 7)
    print(json.dumps([in_parent, status_of(child), torch.equal(run(2), one)]))
'''


def test_a_forked_child_runs_on_and_so_does_its_parent():
    assert run(FORK) == [[True, 0, True]]


def test_a_fork_before_the_first_region_is_noticed():
    code = '''
        torch.set_num_threads(2)
        torch.randn(2000, 2000).relu().sum()
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(run(2), one) else 7)
        print(json.dumps(os.waitpid(child, 0)[1]))
    '''
    assert run(code, timeout=120) == [0]


@pytest.mark.parametrize('lock', ['network._building', 'program._making_ready'])
def test_a_fork_waits_for_what_another_thread_makes_ready(lock):
    code = '''
        from timm_el.engine import network, program
        held = threading.Event()
        other = timm_el.deploy(timm.create_model('el_resnet20').eval())

        def make():
            with LOCK:
                held.set()
                time.sleep(1)

        thread = threading.Thread(target=make)
        thread.start()
        held.wait()
        child = os.fork()
        if child == 0:
            other(torch.randn(1, 3, 32, 32))
            os._exit(0 if torch.equal(run(2), one) else 7)
        status = status_of(child)
        thread.join()
        print(json.dumps([status, torch.equal(run(3), one)]))
    '''
    assert run(code.replace('LOCK', lock), timeout=120) == [[0, True]]


def test_several_python_threads_and_a_number_that_changes_give_the_same_bits():
    code = '''
        wrong = []
        def work(threads):
            for i in range(6):
                if not torch.equal(run(1 + (threads + i) % 4), one):
                    wrong.append((threads, i))
        workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for worker in workers: worker.start()
        for worker in workers: worker.join()
        print(json.dumps([wrong, torch.equal(run(7), one), torch.equal(run(1), one)]))
    '''
    assert run(code) == [[[], True, True]]


@pytest.mark.parametrize('variables', [
    {'OMP_THREAD_LIMIT': '1'}, {'OMP_DYNAMIC': 'true'}, {'OMP_WAIT_POLICY': 'passive'}])
def test_settings_of_openmp_change_no_bit(variables):
    assert run('print(json.dumps([torch.equal(run(n), one) for n in (2, 3, 8)]))', **variables) == [[True] * 3]


def test_a_region_inside_one_of_openmp_does_its_work():
    """A call out of an OpenMP worker gets a team of one, which takes all the work."""
    code = '''
        torch.set_num_threads(2)
        found = []
        member = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: found.append(torch.equal(run(2), one)))
        region = ctypes.CDLL(None).GOMP_parallel
        region.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        region(ctypes.cast(member, ctypes.c_void_p), None, 2, 0)
        print(json.dumps(found))
    '''
    if not has_openmp():
        pytest.skip('this torch brings no OpenMP that others can see')
    assert run(code) == [[True, True]]


def has_openmp() -> bool:
    return run('print(json.dumps(hasattr(ctypes.CDLL(None), "GOMP_parallel")))') == [True]


@pytest.mark.skipif(sys.platform != 'linux', reason='threads are counted in /proc')
def test_the_engine_starts_no_threads_beside_those_of_torch():
    code = '''
        torch.set_num_threads(3)
        torch.randn(2000, 2000).relu().sum()
        before = tids()
        run(3)
        print(json.dumps([hasattr(ctypes.CDLL(None), "GOMP_parallel"), len(tids() - before)]))
    '''
    (openmp, started), = run(code)
    assert started == (0 if openmp else 2)
