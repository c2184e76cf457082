"""Many injections, forwards of many shapes, and two threads for minutes: memory stays, hooks go, answers agree."""

import ctypes
import gc
import os
import random
import threading
import time

import torch
from cases import make_qwen2_vl, qwen2_vl_prompt, randomize, seeded
from toy import ToyEncoder, toy_pixels

from sta_adapter import STAConfig, inject_sta

CYCLES = int(os.environ.get("STA_TORTURE_CYCLES", 10_000))
FORWARDS = int(os.environ.get("STA_TORTURE_FORWARDS", 5_000))
SECONDS = int(os.environ.get("STA_TORTURE_SECONDS", 300))


def resident():
    """Bytes of this process in memory, after everything that can be given back was."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def assert_steady(work, count):
    """Memory after `count` rounds is less than 2 % above that after two fifths of them.

    Until then torch's own buffers for new shapes grow, with an untouched encoder just as much.
    """
    for index in range(count * 2 // 5):
        work(index)
    before = resident()
    for index in range(count * 2 // 5, count):
        work(index)
    assert resident() < 1.02 * before


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_inject_and_remove():
    model = ToyEncoder(depth=2)
    keys = list(model.state_dict())

    def cycle(index):
        handle = inject_sta(model, STAConfig(init="normal"))
        if index % 10 == 0:
            model(toy_pixels([(4, 2)])).sum().backward()
        handle.remove()
        model.zero_grad()

    assert_steady(cycle, CYCLES)
    assert hooks(model) == 0
    assert list(model.state_dict()) == keys


def test_forwards_of_random_shapes():
    model, generator = ToyEncoder(depth=2), random.Random(0)
    inject_sta(model, STAConfig(init="normal"))
    count = hooks(model)

    def forward(index):
        clips = [(generator.randint(1, 40), generator.randint(1, 20)) for _ in range(generator.randint(1, 4))]
        output = model(toy_pixels(clips, index), clips=clips)
        if index % 3 == 0:
            output.sum().backward()
            model.zero_grad()

    assert_steady(forward, FORWARDS)
    assert hooks(model) == count


def test_two_threads_generate_what_one_does():
    model = seeded(make_qwen2_vl).eval()
    for module in inject_sta(model).blocks.values():
        randomize(module)
    prompts = [qwen2_vl_prompt(frames) for frames in (2, 3, 5, 8)]

    def answer(prompt):
        with torch.no_grad():
            return model.generate(
                **prompt, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
            )

    alone = [answer(prompt) for prompt in prompts]
    end, failures, rounds, begun = time.monotonic() + SECONDS, [], [0, 0], threading.Barrier(2)

    def work(number):
        generator = random.Random(number)
        begun.wait()
        while time.monotonic() < end and not failures:
            index = generator.randrange(len(prompts))
            try:
                found = answer(prompts[index])
                if not all(torch.equal(a, b) for a, b in zip(found.logits, alone[index].logits, strict=True)):
                    failures.append(f"thread {number}, prompt {index}: other logits")
            except Exception as error:
                failures.append(repr(error))
            rounds[number] += 1
            time.sleep(0.001)  # on a single core a thread that never waits keeps the interpreter for itself

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert min(rounds) > 1
