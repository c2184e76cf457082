"""Streams: chunks of any size give what one forward over the whole clip gives, in every backbone that computes frames apart."""

import contextlib
import io
import threading

import pytest
import torch
from cases import Clip, case_parameters, randomize, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import TOY, ToyEncoder, toy, toy_pixels  # noqa: F401

from sta_adapter import STAConfig, inject_sta
from sta_adapter.errors import ConfigError, InjectionError, LayoutError, StreamError

streaming_case = pytest.mark.parametrize("case", case_parameters(lambda case: case.backbone != "internvideo2"))
JOINT = pytest.mark.parametrize("case", case_parameters(lambda case: case.backbone == "internvideo2"))


def injected(make, **config):
    """A model with random weights everywhere, and the handle of its causal STA."""
    handle = inject_sta(seeded(make), STAConfig(causal=True, **config))
    for module in handle.blocks.values():
        randomize(module)
    return handle


def pieces(clip, chunks):
    """The clip cut into chunks of these lengths."""
    starts = [sum(chunks[:i]) for i in range(len(chunks))]
    return [Clip(frames, clip.seed, clip.changed, start) for start, frames in zip(starts, chunks, strict=True)]


def equal_features(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@streaming_case
def test_chunks_are_the_whole_clip(case):
    handle, windowed = injected(case.make), injected(case.make, window=3)
    encoder = case.encoder(handle.model)
    clip = Clip(7)
    with torch.no_grad():
        everything, expected = (case.run(h.model, [clip])[0] for h in (handle, windowed))
    assert not torch.allclose(everything, expected, atol=1e-3), "the window makes no difference"
    for window, chunks, expected in ((3, (1,) * 7, expected), (3, (2, 1, 4), expected), (50, (3, 1, 3), everything)):
        with handle.stream(window=window) as stream:
            found = []
            for piece in pieces(clip, chunks):
                if window == 50:  # where frames come as a batch, nobody needs to tell that they are one stream's
                    found += case.features(encoder(**case.arguments([piece])), [piece])
                else:
                    found += case.run(handle.model, [piece])
        assert stream.frames == 7
        equal_features(torch.cat(found), expected)


CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "rope_theta": st.sampled_from([None, 100.0]),
        "order": st.just("before_spatial"),
        "gamma_init": st.just(0.5),
        "single_frames": st.just(False),
        "attention": st.sampled_from(["sdpa", "eager"]),
        "layers": st.sampled_from([(0, 2), (1,)]),
        "head_scale": st.just(1.0),
    },
)


@settings(max_examples=60)
@given(
    chunks=st.lists(st.integers(1, 7), min_size=2, max_size=8),
    window=st.integers(1, 12),
    positions=st.integers(1, 4),
    config=CONFIGS,
)
def test_every_chunk_size_and_setting(toy, chunks, window, positions, config):  # noqa: F811
    whole_handle = injected(ToyEncoder, window=window, **config)
    handle = injected(ToyEncoder, **config)
    pixels = toy_pixels([(sum(chunks), positions)])
    with torch.no_grad():
        expected = whole_handle.model(pixels, clips=((sum(chunks), positions),))
    with handle.stream(window=window) as stream:
        parts = pixels.split([n * positions for n in chunks])
        found = [handle.model(p, clips=((n, positions),)) for n, p in zip(chunks, parts, strict=True)]
        equal_features(torch.cat(found), expected)
        heads, size = handle.blocks[min(handle.blocks)].num_heads, handle.blocks[min(handle.blocks)].head_dim
        assert stream.frames == sum(chunks)
        assert stream.bytes == 2 * heads * size * positions * window * len(handle.blocks) * 4


@settings(max_examples=20)
@given(
    rounds=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=2, max_size=5),
    windows=st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
def test_several_streams_in_one_call(toy, rounds, windows):  # noqa: F811
    handle = injected(ToyEncoder)
    sizes = (2, 3)
    streams = [handle.stream(window=w, name=n) for w, n in zip(windows, ("left", "right"), strict=True)]
    totals = [sum(r[i] for r in rounds) for i in range(2)]
    clips = [toy_pixels([(total, size)], seed) for seed, (total, size) in enumerate(zip(totals, sizes, strict=True))]
    rest, found = list(clips), ([], [])
    with handle.streams(*streams):
        for lengths in rounds:
            counts = [n * size for n, size in zip(lengths, sizes, strict=True)]
            parts = [pixels[:count] for pixels, count in zip(rest, counts, strict=True)]
            rest = [pixels[count:] for pixels, count in zip(rest, counts, strict=True)]
            out = handle.model(torch.cat(parts), clips=tuple(zip(lengths, sizes, strict=True))).split(counts)
            for kept, part in zip(found, out, strict=True):
                kept.append(part)
    for i, window in enumerate(windows):
        with torch.no_grad():
            expected = injected(ToyEncoder, window=window).model(clips[i], clips=((totals[i], sizes[i]),))
        equal_features(torch.cat(found[i]), expected)
        assert streams[i].frames == totals[i]


def one(handle, frames=1, positions=2, seed=0):
    """Features of the next frames."""
    return handle.model(toy_pixels([(frames, positions)], seed), clips=((frames, positions),))


def test_streams_take_turns_and_go_on_after_their_block(toy):  # noqa: F811
    handle = injected(ToyEncoder)
    left, right, alone = (handle.stream(window=4, name=n) for n in ("left", "right", "alone"))
    for frame in range(6):
        with left:
            found = one(handle, seed=frame)
            with right:
                one(handle, seed=100 + frame)
        with torch.no_grad():
            one(handle, frames=3)  # outside of a stream: a clip of its own
        with alone:
            expected = one(handle, seed=frame)
        assert torch.equal(found, expected)
    assert left.frames == right.frames == 6


def test_the_frame_index_is_exact_after_a_hundred_thousand_frames(toy):  # noqa: F811
    handle = injected(ToyEncoder)
    early, late = handle.stream(window=5), handle.stream(window=5)
    with early:
        for frame in range(4):
            one(handle, seed=frame)
    state = early.state_dict()
    late.load_state_dict({**state, "frames": 99_980})  # keys of other frames, which no later one sees after a while
    for frame in range(60):
        with early:
            expected = one(handle, seed=frame)
        with late:
            found = one(handle, seed=frame)
    assert late.frames == 100_040
    equal_features(found, expected)


def test_nothing_but_the_window_stays(toy):  # noqa: F811
    handle = injected(ToyEncoder)
    with handle.stream(window=3) as stream:
        assert (stream.frames, stream.bytes) == (0, 0)
        one(handle)
        pointers = [cache.data_ptr() for cache in stream._state.caches.values()]
        size = stream.bytes
        for chunk in (1, 1, 5, 1, 2, 9):
            one(handle, chunk)
            assert stream.bytes == size
        assert [cache.data_ptr() for cache in stream._state.caches.values()] == pointers
    stream.reset()
    assert (stream.frames, stream.bytes) == (0, 0)


@pytest.mark.parametrize("chunk", [1, 2, 6])
@pytest.mark.parametrize("seen", [0, 2, 5])
@pytest.mark.parametrize("block", [0, 2])
@pytest.mark.parametrize("failure", [ZeroDivisionError, KeyboardInterrupt])
def test_a_failure_in_mid_frame_leaves_the_stream_as_before(toy, chunk, seen, block, failure):  # noqa: F811
    handle, twin = injected(ToyEncoder), injected(ToyEncoder)

    def fail(*_):
        raise failure

    with handle.stream(window=3) as stream, twin.stream(window=3) as same:
        for frame in range(seen):
            one(handle, seed=frame), one(twin, seed=frame)
        before, size = stream.state_dict(), stream.bytes
        broken = handle.model.blocks[block].register_forward_hook(fail)
        with pytest.raises(failure):
            one(handle, chunk, seed=77)
        broken.remove()
        after = stream.state_dict()
        assert (stream.frames, stream.bytes) == (seen, size)
        assert all(torch.equal(after["blocks"][i], before["blocks"][i]) for i in before["blocks"])
        for frame in (8, 9, 10):
            assert torch.equal(one(handle, seed=frame), one(twin, seed=frame))
        assert torch.equal(one(handle, 4), one(twin, 4))
    assert stream.frames == same.frames == seen + 7


def test_resize_in_mid_stream(toy):  # noqa: F811
    handle = injected(ToyEncoder)
    with handle.stream(window=3) as stream:
        one(handle, positions=2)
        expected = stream.state_dict()
        with pytest.raises(LayoutError, match=r"1 frames of 2 patches.*frames of 3 patches.*stream\.reset\(\)"):
            one(handle, positions=3)
        assert torch.equal(stream.state_dict()["blocks"][0], expected["blocks"][0])
        one(handle, positions=2)
        stream.reset()
        one(handle, positions=3)
    assert stream.frames == 1


def test_frames_of_as_many_patches_in_other_rows_and_columns():
    from cases import make_qwen2_vl_tower

    handle = injected(make_qwen2_vl_tower)
    pixels = torch.randn(8, 96)
    with handle.stream(window=3):
        handle.model(pixels, grid_thw=torch.tensor([[1, 2, 4]]))
        with pytest.raises(LayoutError, match=r"\(2 x 4\), and got frames of 8 patches \(4 x 2\)"):
            handle.model(pixels, grid_thw=torch.tensor([[1, 4, 2]]))


def test_one_clip_a_stream(toy):  # noqa: F811
    handle = injected(ToyEncoder)
    with (
        handle.stream(window=3) as stream,
        pytest.raises(LayoutError, match=r"got 2 clips.*for 1 stream \(stream\).*one of"),
    ):
        handle.model(toy_pixels([(1, 2), (1, 2)]), clips=((1, 2), (1, 2)))
    left, right = handle.stream(window=3, name="left"), handle.stream(window=3, name="right")
    with handle.streams(left, right), pytest.raises(LayoutError, match=r"1 clips.*for 2 streams \(left, right\)"):
        one(handle)
    assert stream.frames == left.frames == right.frames == 0


def test_streams_of_another_model_or_twice_the_same(toy):  # noqa: F811
    handle, other = injected(ToyEncoder), injected(ToyEncoder)
    stream = handle.stream(window=3)
    for wrong in ((), (stream, stream), (other.stream(window=3),), ([stream],), (None,)):
        with pytest.raises(ConfigError, match="one or more different streams"):
            handle.streams(*wrong)


def test_no_gradients(toy):  # noqa: F811
    handle = injected(ToyEncoder)
    assert torch.is_grad_enabled()
    with handle.stream(window=3) as stream:
        assert not one(handle).requires_grad
        with torch.enable_grad(), pytest.raises(StreamError, match="no gradient through it"):
            one(handle)
        assert not one(handle, 2).requires_grad
        assert not any(cache.requires_grad for cache in stream._state.caches.values())
    assert torch.is_grad_enabled()
    assert stream.frames == 3


def test_inference_mode_in_turns(toy):  # noqa: F811
    handle = injected(ToyEncoder)
    with handle.stream(window=3) as stream:
        for frame in range(6):
            with torch.inference_mode() if frame % 2 == 0 else contextlib.nullcontext():
                one(handle, 1 + frame % 3)
    assert stream.frames == 12


def in_a_thread(function):
    """What the function raised in a thread of its own, or None."""
    raised = []

    def run():
        try:
            function()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0] if raised else None


def test_two_threads_on_one_stream(toy):  # noqa: F811
    handle = injected(ToyEncoder)
    stream = handle.stream(window=3, name="door")

    def enter():
        with stream:
            one(handle)

    with stream:
        one(handle)
        state = stream.state_dict()
        both = handle.streams(handle.stream(window=3), stream)
        for use in (enter, both.__enter__, stream.reset, stream.state_dict, lambda: stream.load_state_dict(state)):
            error = in_a_thread(use)
            assert isinstance(error, StreamError), error
            assert "'door' is in use by another thread" in str(error)
        assert stream.frames == 1
    assert in_a_thread(enter) is None
    assert stream.frames == 2


def test_threads_with_streams_of_their_own_and_clips_meanwhile(toy):  # noqa: F811
    handle = injected(ToyEncoder)
    with torch.no_grad():
        expected = injected(ToyEncoder, window=3).model(toy_pixels([(30, 2)]), clips=((30, 2),)).view(30, 2, -1)
    found, barrier = {}, threading.Barrier(3)

    def follow(name, chunk):
        with handle.stream(window=3, name=name) as stream:
            parts = toy_pixels([(30, 2)]).split(2 * chunk)
            barrier.wait()
            found[name] = torch.cat([handle.model(p, clips=((chunk, 2),)).view(chunk, 2, -1) for p in parts])
            assert stream.frames == 30

    threads = [threading.Thread(target=follow, args=(name, chunk)) for name, chunk in (("a", 1), ("b", 3))]
    for thread in threads:
        thread.start()
    barrier.wait()
    with torch.no_grad():
        clips = [one(handle, 5) for _ in range(30)]
    for thread in threads:
        thread.join()
    assert set(found) == {"a", "b"}
    for features in found.values():
        equal_features(features, expected)
    assert all(torch.equal(clip, clips[0]) for clip in clips)


@pytest.mark.parametrize("seen", [0, 1, 4, 9])
def test_saved_and_restored(toy, seen):  # noqa: F811
    handle = injected(ToyEncoder)
    with handle.stream(window=4) as stream:
        for frame in range(seen):
            one(handle, seed=frame)
        file = io.BytesIO()
        torch.save(stream.state_dict(), file)
        size, expected = stream.bytes, [one(handle, n, seed=50 + n) for n in (1, 3, 1)]
    file.seek(0)
    fresh = injected(ToyEncoder)
    with fresh.stream(window=4) as restored:
        one(fresh, 3, positions=5)  # is forgotten
        restored.load_state_dict(torch.load(file, weights_only=True))
        assert (restored.frames, restored.bytes) == (seen, size)
        assert all(torch.equal(one(fresh, n, seed=50 + n), e) for n, e in zip((1, 3, 1), expected, strict=True))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"window": 5}, "its window is 5, here 4"),
        ({"backbone": "qwen2_vl"}, "its backbone is 'qwen2_vl', here 'toy'"),
        ({"format": 2}, "its format is 2, here 1"),
        ({"frames": -1}, "frames=-1"),
        ({"frames": "9"}, "frames='9'"),
        ({"frames": 2}, r"block 0 has the shape \(2, 2, 3, 1, 8\), here \(2, 2, 2, 1, 8\)"),
        ({"positions": 3}, "block 2 has the shape"),
        ({"positions": None}, "positions=None"),
        ({"grid": ["a"]}, r"grid=\['a'\]"),
        ({"grid": 5}, "grid=5"),
        ({"blocks": {}}, r"it has the blocks \[\], the adapter \['0', '1', '2'\]"),
        ({"blocks": dict.fromkeys(range(3))}, "block 1 has no floating-point tensor"),
        ({"blocks": {i: torch.full((2, 2, 3, 1, 8), torch.nan) for i in range(3)}}, "block 0 holds NaN"),
        ({"more": 1}, "it has the keys"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_state_that_does_not_fit(toy, change, reason):  # noqa: F811
    handle = injected(ToyEncoder)
    with handle.stream(window=4) as stream:
        one(handle, 9)
        state = stream.state_dict()
        with pytest.raises(StreamError, match=f"(?s)doesn't fit the stream: .*{reason}.*The stream is as before"):
            stream.load_state_dict({**state, **change})
        assert torch.equal(stream.state_dict()["blocks"][1], state["blocks"][1])
    with pytest.raises(StreamError, match="it is a list, not the mapping"):
        stream.load_state_dict([state])


def test_a_state_before_the_first_frame_has_to_fit_too(toy):  # noqa: F811
    handle = injected(ToyEncoder)
    state = handle.stream(window=5).state_dict()
    with pytest.raises(StreamError, match="its window is 5, here 4"):
        handle.stream(window=4).load_state_dict(state)


@JOINT
def test_encoders_that_look_across_frames_are_refused(case):
    handle = injected(case.make)
    with pytest.raises(ConfigError, match="'internvideo2' is not known to compute each frame by itself"):
        handle.stream(window=4)


@pytest.mark.parametrize(
    ("config", "window", "reason"),
    [
        ({}, 4, "causal=False: its frames attend to later ones"),
        ({"causal": True}, 0, "window=0: expected a whole number of frames above 0"),
        ({"causal": True}, -3, "window=-3: expected a whole number"),
        ({"causal": True}, 2.0, "window=2.0: expected a whole number"),
        ({"causal": True}, True, "window=True: expected a whole number"),
        ({"causal": True}, "4", "window='4': expected a whole number"),
        ({"causal": True}, None, r"say how many a stream keeps: handle.stream\(window=64\)"),
        ({"causal": True, "window": 3}, 4, "window=4: this adapter looks back over 3 frames"),
    ],
    ids=lambda value: str(value),
)
def test_what_no_stream_can_be_made_with(toy, config, window, reason):  # noqa: F811
    handle = inject_sta(toy, STAConfig(**config))
    with pytest.raises(ConfigError, match=reason):
        handle.stream(window=window)


def test_the_published_token_order_is_refused():
    from cases import make_qwen2_vl_tower

    handle = injected(make_qwen2_vl_tower, token_order="published")
    with pytest.raises(ConfigError, match="mixes up frames that a stream has not seen yet"):
        handle.stream(window=4)


def test_the_window_is_the_adapters_own_by_default(toy):  # noqa: F811
    handle = injected(ToyEncoder, window=3)
    assert handle.stream().window == 3
    assert handle.stream(window=2).window == 2


def test_no_stream_of_what_was_removed(toy):  # noqa: F811
    handle = injected(ToyEncoder)
    stream = handle.stream(window=3)
    handle.remove()
    with pytest.raises(InjectionError, match="has been removed"):
        stream.__enter__()
    with pytest.raises(InjectionError, match="has been removed"):
        handle.stream(window=3)


def test_switched_off_the_stream_stands_still(toy):  # noqa: F811
    handle = injected(ToyEncoder)
    with torch.no_grad(), handle.disabled():
        expected = one(handle, 3)
    with handle.stream(window=3) as stream:
        one(handle)
        with handle.disabled():
            assert torch.equal(one(handle, 3), expected)
        assert stream.frames == 1


def test_another_dtype_in_mid_stream(toy):  # noqa: F811
    handle = injected(ToyEncoder)
    with handle.stream(window=3) as stream:
        one(handle)
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(StreamError, match=r"'stream' was computed in torch\.float32 on cpu so far"),
        ):
            one(handle)
        assert stream.frames == 1
        stream.reset()
        with torch.autocast("cpu", torch.bfloat16):
            one(handle)
            one(handle, 2)
        heads = handle.blocks[0].num_heads
        assert stream.bytes == 2 * heads * 8 * 2 * 3 * 3 * 2


def test_an_encoder_that_skips_a_block(toy):  # noqa: F811
    handle = injected(ToyEncoder)
    blocks = handle.model.blocks
    with handle.stream(window=3) as stream:
        one(handle)
        handle.model.forward = lambda *args, **more: blocks[1](blocks[0](handle.model.embed(args[0])))
        with pytest.raises(LayoutError, match=r"blocks \[2\] did not run"):
            one(handle)
        handle.model.forward = lambda *args, **more: blocks[1](blocks[1](handle.model.embed(args[0])))
        with pytest.raises(LayoutError, match="block 1 ran twice in one call"):
            one(handle)
    assert stream.frames == 1


def test_a_window_that_no_memory_holds(toy):  # noqa: F811
    handle = injected(ToyEncoder)
    with (
        handle.stream(window=10**14) as stream,
        pytest.raises(StreamError, match=r"(?s)stream 'stream': a block keeps .* a smaller window or smaller frames"),
    ):
        one(handle)
    assert stream.frames == 0


def test_compiled(toy):  # noqa: F811
    handle, windowed = injected(ToyEncoder), injected(ToyEncoder, window=3)
    pixels = toy_pixels([(7, 2)])
    with torch.no_grad():
        expected = windowed.model(pixels, clips=((7, 2),))
        compiled = torch.compile(windowed.model, backend="aot_eager")(pixels, clips=((7, 2),))
    equal_features(compiled, expected)
    encoder = torch.compile(handle.model, backend="aot_eager")
    with handle.stream(window=3) as stream:
        parts = zip(pixels.split([2, 4, 2, 4, 2]), (1, 2, 1, 2, 1), strict=True)
        found = [encoder(part, clips=((frames, 2),)) for part, frames in parts]
    assert stream.frames == 7
    equal_features(torch.cat(found), expected)


@pytest.mark.parametrize("case", case_parameters(lambda case: case.id in ("internvl", "llava_onevision")))
def test_frames_through_the_full_model(case):
    handle = injected(case.make)
    is_llava = case.id == "llava_onevision"
    name = "get_video_features" if is_llava else "get_image_features"
    call = getattr(handle.model, name, None) or getattr(getattr(handle.model, "model", None), name, None)
    if call is None:
        pytest.skip("this release of transformers has no such method")
    layer = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full" if is_llava else "default"}
    outputs = []
    case.encoder(handle.model).register_forward_hook(lambda module, args, output: outputs.append(output[0]))

    def encode(pixels):
        call(pixels[None] if is_llava else pixels, **layer)
        return outputs.pop()

    with handle.stream(window=9) as stream:
        found = torch.cat([encode(piece.pixels(3, 16, 16)) for piece in pieces(Clip(6), (2, 1, 3))])
    assert stream.frames == 6
    with torch.no_grad(), handle.clips([6]):
        equal_features(found, encode(Clip(6).pixels(3, 16, 16)))
    two, told = Clip(2).pixels(3, 16, 16), handle.clips(None if is_llava else [1, 1])
    with handle.stream(window=9), told, pytest.raises(LayoutError, match="got 2 clips"):
        call(two[:, None] if is_llava else two, **layer)
