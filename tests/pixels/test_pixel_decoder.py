"""PixelDecoder against the pipelines' own decoding: bits of the frames, gradients, memory, errors, what stays."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import tinyvaes
import torch
from torch import Tensor, nn

import prfl_fast
from prfl_fast.memory.trace import LiveBytes
from prfl_fast.pixels import decoder_for
from prfl_fast.pixels.chunks import checkpointed_calls, decode_in_chunks

pytest.importorskip("diffusers")


def gradients(vae: Any, decode: Callable[[Tensor], Tensor], latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Frames, and the gradients of their fixed random sum: of the latents, of all the VAE's parameters."""
    vae.zero_grad(set_to_none=True)
    leaf = latents.detach().requires_grad_()
    frames = decode(leaf)
    weights = torch.randn(frames.shape, generator=torch.Generator().manual_seed(3), dtype=frames.dtype)
    (weights * frames).sum().backward()
    assert leaf.grad is not None
    own = torch.cat([p.grad.flatten() for p in vae.parameters() if p.grad is not None])
    return frames.detach(), leaf.grad, own


def assert_as_plain(name: str, vae: Any, latents: Tensor) -> None:
    expected = gradients(vae, lambda x: tinyvaes.plain(name, vae, x), latents)
    actual = gradients(vae, prfl_fast.PixelDecoder(vae), latents)
    assert ((expected[0] > 0) & (expected[0] < 1)).double().mean() > 0.5, "most pixels must matter"
    assert torch.equal(actual[0], expected[0]), "the same operations on the same numbers"
    for mine, theirs in zip(actual[1:], expected[1:], strict=True):
        # The same products, added up in another order at most: far below 1e-10 of the norm in float64.
        assert theirs.norm() > 0 and (mine - theirs).norm() <= 1e-10 * theirs.norm()


@pytest.mark.parametrize("name", tinyvaes.MAKERS)
@pytest.mark.parametrize(("batch", "frames"), [(2, 5), (1, 2)])
def test_frames_and_gradients_of_every_family(name: str, batch: int, frames: int) -> None:
    assert_as_plain(name, tinyvaes.MAKERS[name](), tinyvaes.latents(name, batch, frames))


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
@pytest.mark.parametrize("frames", [1, 3, 4, 7, 10])
def test_any_number_of_chunks_in_segments(name: str, frames: int) -> None:
    assert_as_plain(name, tinyvaes.MAKERS[name](), tinyvaes.latents(name, 1, frames, 1, 2))


@pytest.mark.parametrize("name", ["wan", "hunyuan", "cogvideox"])
def test_latents_that_are_not_contiguous(name: str) -> None:
    latents = tinyvaes.latents(name, 2, 3, 4, 3).transpose(3, 4)[..., 1:]
    assert not latents.is_contiguous()
    assert_as_plain(name, tinyvaes.MAKERS[name](), latents)


@pytest.mark.parametrize("name", ["wan", "hunyuan", "cogvideox"])
def test_slices_and_tiles_as_the_vae_makes_them(name: str) -> None:
    vae = tinyvaes.MAKERS[name]()
    vae.enable_slicing()
    # Tiles of two by two latent pixels that overlap by half, of 8 pixels each as these VAEs count them.
    strides = {} if name == "cogvideox" else {"tile_sample_stride_height": 8, "tile_sample_stride_width": 8}
    for tiles in (False, True):
        if tiles:
            vae.enable_tiling(16, 16, **strides)
        calls: list[int] = []
        handle = vae.decoder.register_forward_hook(lambda *_, seen=calls: seen.append(1))
        assert_as_plain(name, vae, tinyvaes.latents(name, 2, 2, 2, 3))
        handle.remove()
        # Two samples; Wan makes one call a frame; each of them in two tiles or more. Ours and the plain one alike.
        assert len(calls) >= 2 * 2 * (2 if name == "wan" else 1) * (2 if tiles else 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wan_as_it_is_loaded(dtype: torch.dtype) -> None:
    """With its upsampling through float32, in the dtypes of use: the bits of frames and gradients still agree."""
    vae = tinyvaes.wan()
    for module in vae.modules():
        if type(module).__name__ == "WanUpsample":
            del module.forward
    vae.to(dtype)
    latents = tinyvaes.latents("wan", 2, 4)
    expected = gradients(vae, lambda x: tinyvaes.plain("wan", vae, x.to(dtype)), latents)
    actual = gradients(vae, prfl_fast.PixelDecoder(vae), latents)
    assert actual[0].dtype == dtype and torch.equal(actual[0], expected[0])
    # Each latent frame's gradient is a sum over at most 7 calls, rounded to the dtype at each addition.
    bound = 7 * torch.finfo(dtype).eps
    assert (actual[1] - expected[1]).norm() <= bound * expected[1].norm()


def test_a_slice_of_latent_frames_is_a_video_of_its_own() -> None:
    for name, time in (("wan", 2), ("cogvideox", 1)):
        vae = tinyvaes.MAKERS[name]()
        latents = tinyvaes.latents(name, 2, 5)
        for part in (slice(1), slice(1, 4), slice(-2, None)):
            index = (slice(None),) * time + (part,)
            actual = gradients(vae, prfl_fast.PixelDecoder(vae, latent_frames=part), latents)
            expected = gradients(vae, lambda x, i=index, n=name, v=vae: tinyvaes.plain(n, v, x[i]), latents)
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    # Wan is causal frame by frame: its first latent frame is the first frame of the whole video.
    vae = tinyvaes.wan()
    latents = tinyvaes.latents("wan", 1, 3)
    alone, whole = (prfl_fast.PixelDecoder(vae, latent_frames=part)(latents) for part in (slice(1), None))
    # One convolution runs over the whole video before it is parted, and may add up in another order there.
    torch.testing.assert_close(alone, whole[:, :, :1], rtol=1e-12, atol=1e-12)


def test_packed_latents() -> None:
    vae = tinyvaes.ltx()
    latents = tinyvaes.latents("ltx", 2, 3, 2, 3)
    packed = latents.permute(0, 2, 3, 4, 1).reshape(2, 3 * 2 * 3, tinyvaes.CHANNELS)
    decode = prfl_fast.PixelDecoder(vae, latent_shape=(3, 2, 3), latent_frames=slice(2))
    actual = gradients(vae, decode, packed)
    expected = gradients(vae, lambda x: tinyvaes.plain("ltx", vae, x[:, :, :2]), latents)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1].unflatten(1, (3, 2, 3)).permute(0, 4, 1, 2, 3), expected[1])


def test_the_clamp_has_no_gradient_outside() -> None:
    vae = tinyvaes.wan()
    latents = (40 * tinyvaes.latents("wan", 1, 2)).requires_grad_()
    frames = prfl_fast.PixelDecoder(vae)(latents)
    outside = (frames == 0) | (frames == 1)
    assert outside.any() and not outside.all()
    (nothing,) = torch.autograd.grad(frames[outside].sum(), latents, retain_graph=True)
    (something,) = torch.autograd.grad(frames[~outside].sum(), latents)
    assert not nothing.any() and something.any()


# What is kept, what is called, what stays.


def test_a_frozen_decoder_gets_no_gradient_and_a_trainable_part_does() -> None:
    vae = tinyvaes.wan().requires_grad_(False)
    vae.decoder.conv_out.weight.requires_grad_(True)
    gradients(vae, prfl_fast.PixelDecoder(vae), tinyvaes.latents("wan", 1, 3))
    assert [n for n, p in vae.named_parameters() if p.grad is not None] == ["decoder.conv_out.weight"]


def test_nothing_is_kept_without_a_gradient() -> None:
    vae = tinyvaes.wan().requires_grad_(False)
    frames = prfl_fast.PixelDecoder(vae)(tinyvaes.latents("wan", 1, 3))
    assert not frames.requires_grad
    leaf = tinyvaes.latents("wan", 1, 3).requires_grad_()
    with torch.no_grad():
        assert not prfl_fast.PixelDecoder(vae)(leaf).requires_grad


@pytest.mark.parametrize("name", ["wan", "hunyuan", "cogvideox"])
def test_two_decodings_at_once_and_two_backwards(name: str) -> None:
    """A recomputation starts from the cache that its chunk had, whatever was decoded since."""
    vae = tinyvaes.MAKERS[name]().requires_grad_(False)
    decode = prfl_fast.PixelDecoder(vae)
    first, second = (tinyvaes.latents(name, 1, 5).requires_grad_() for _ in range(2))
    expected = torch.autograd.grad(tinyvaes.plain(name, vae, first).square().sum(), first)[0]
    frames, others = decode(first), decode(second)
    vae.decode(torch.randn(1, tinyvaes.CHANNELS, 3, 2, 3, dtype=torch.float64))  # the user looks at another video
    others.square().sum().backward()
    for retain in (True, False):
        (actual,) = torch.autograd.grad(frames.square().sum(), first, retain_graph=retain)
        assert (actual - expected).norm() <= 1e-10 * expected.norm()


def chunk_peaks(frames: int, decode: Callable[[Any, Tensor], Tensor]) -> int:
    vae = tinyvaes.wan(base_dim=4).requires_grad_(False)
    leaf = tinyvaes.latents("wan", 1, frames, 4, 4).requires_grad_()
    with LiveBytes() as live:
        decode(vae, leaf).sum().backward()
    return live.peak


def test_memory_holds_one_chunk_and_two_roots_of_caches() -> None:
    few, many = 4, 16
    plain = [chunk_peaks(n, lambda vae, x: tinyvaes.plain("wan", vae, x)) for n in (few, many)]
    ours = [chunk_peaks(n, lambda vae, x: prfl_fast.PixelDecoder(vae)(x)) for n in (few, many)]
    per_frame = (plain[1] - plain[0]) / (many - few)
    # A graph of one more latent frame holds its cache too, and many times that; with 16 chunks there are at most 8
    # caches at a time and with 4 chunks 4: the difference is less than one frame's graph.
    assert ours[1] - ours[0] < per_frame
    assert ours[1] < plain[1] / 4


def test_a_cache_on_the_way_costs_what_a_list_of_two_roots_costs() -> None:
    """The engine alone: each step hands on a tensor of 1,000 numbers; the graph of a step holds 10 of them."""

    def step(index: int, chunk: Tensor, carry: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        state = carry["state"]
        for _ in range(10):
            state = torch.sin(state + chunk.sum())
        return chunk * state.mean(), {"state": state}

    peaks = []
    for count in (9, 36):
        chunks = torch.randn(1, 1, count, 1, 1, dtype=torch.float64).requires_grad_()
        carry = {"state": torch.randn(1000, dtype=torch.float64).requires_grad_()}
        with LiveBytes() as live:
            decode_in_chunks(step, chunks.split(1, 2), carry).sum().backward()
        peaks.append(live.peak)
    # 2 sqrt(36) against 2 sqrt(9) states of 8,192 bytes (rounded up), and small tensors of every chunk: its slice, its
    # result, their gradients, 512 bytes each.
    assert peaks[1] - peaks[0] <= 6 * 8192 + 27 * 8 * 512


def test_a_fault_leaves_the_decoder_as_it_was() -> None:
    for name in ("hunyuan", "wan"):
        vae = tinyvaes.MAKERS[name]()
        own = vae.decoder.forward

        def fail(*arguments: Any, **keywords: Any) -> Tensor:
            raise RuntimeError("no memory")

        vae.decoder.forward = fail
        with pytest.raises(RuntimeError, match="no memory"):
            prfl_fast.PixelDecoder(vae)(tinyvaes.latents(name, 1, 2))
        assert vae.decoder.forward is fail, "what the user had put there"
        del vae.decoder.forward
        assert vae.decoder.forward == own
        handle = vae.decoder.conv_out.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="no memory"):
            prfl_fast.PixelDecoder(vae)(tinyvaes.latents(name, 1, 2))
        handle.remove()
        assert "forward" not in vars(vae.decoder)
        assert_as_plain(name, vae, tinyvaes.latents(name, 1, 2))


def test_each_call_is_a_checkpoint_of_its_own() -> None:
    seen: list[int] = []

    class Decoder(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(int(x[0]))
            return x.sin().exp()

    decoder = Decoder()
    leaves = [torch.tensor([float(i)], requires_grad=True) for i in range(3)]
    with checkpointed_calls(decoder):
        total = torch.stack([decoder(leaf) for leaf in leaves]).sum()
    assert seen == [0, 1, 2] and "forward" not in vars(decoder)
    total.backward()
    assert sorted(seen[3:]) == [0, 1, 2]
    decoder(leaves[0])
    assert len(seen) == 7, "called directly afterwards"


# Errors.


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"latent_frames": 1}, TypeError, "latent_frames: expected a slice"),
        ({"latent_frames": slice(0, 4, 2)}, ValueError, "slice of step 1"),
        ({"latent_shape": (1, 2, 3)}, ValueError, "latent_shape: expected None"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        prfl_fast.PixelDecoder(tinyvaes.wan(), **arguments)


@pytest.mark.parametrize("shape", [(1, 2), [1, 2, 3], (0, 1, 1), (True, 1, 1), (1.0, 1, 1)])
def test_wrong_packed_sizes(shape: Any) -> None:
    with pytest.raises(ValueError, match=r"latent_shape: expected \(frames, height, width\)"):
        prfl_fast.PixelDecoder(tinyvaes.ltx(), latent_shape=shape)


def test_what_is_no_vae() -> None:
    import diffusers

    image_vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=1, latent_channels=4)
    for wrong in (image_vae, nn.Linear(1, 1), 3, None):
        with pytest.raises(TypeError, match="vae: expected one of AutoencoderKLWan, .*function of the latents"):
            prfl_fast.PixelDecoder(wrong)
    latents = torch.randn(1, 4, 1, 2, 2)
    with pytest.raises(TypeError, match="vae: expected one of .* got AutoencoderKL;"):
        decoder_for(image_vae, latents)
    with pytest.raises(TypeError, match="decode: expected a VAE, a PixelDecoder or a function, got int"):
        decoder_for(3, latents)
    module = nn.Conv3d(4, 3, 1)
    assert decoder_for(module, latents) is module


@pytest.mark.parametrize(
    ("name", "shape", "text"),
    [
        ("wan", (1, 5, 2, 2, 2), r"expected \[B, C, F, H, W\] with 4 channels for AutoencoderKLWan"),
        ("wan", (1, 4, 2, 2), r"expected \[B, C, F, H, W\]"),
        ("cogvideox", (1, 4, 2, 2, 2), r"expected \[B, F, C, H, W\] with 4 channels"),
        ("ltx", (1, 12, 4), r"for packed ones give latent_shape"),
    ],
)
def test_latents_that_do_not_fit(name: str, shape: tuple[int, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        prfl_fast.PixelDecoder(tinyvaes.MAKERS[name]()).check(torch.zeros(shape))


def test_packed_latents_that_do_not_fit_and_frames_that_are_not_there() -> None:
    vae = tinyvaes.ltx()
    with pytest.raises(ValueError, match=r"expected packed ones \[B, S, C\] of shape \(1, 6, 4\)"):
        prfl_fast.PixelDecoder(vae, latent_shape=(1, 2, 3)).check(torch.zeros(1, 7, 4))
    with pytest.raises(ValueError, match="latent_frames: slice.* takes none of 3 latent frames"):
        prfl_fast.PixelDecoder(vae, latent_frames=slice(3, None)).check(torch.zeros(1, 4, 3, 1, 1))


def test_a_subclass_is_taken_for_its_family() -> None:
    vae = tinyvaes.wan()
    vae.__class__ = types.new_class("AutoencoderOfMine", (type(vae),))
    assert_as_plain("wan", vae, tinyvaes.latents("wan", 1, 2))
