"""Figures hold what they are given where a reader looks for it, and the walk is the paper's circle."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.pipelines.dit import pipeline_dit
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from tiny_models import tiny_kl, tiny_unet, tiny_vq

from noisycond import randomness
from noisycond.errors import InputError
from noisycond.evaluation.figures import circle_of_noise, circular_walk, nearest_neighbours, save_walk, side_by_side
from noisycond.pipelines import ClassEmbedder, LDMClassToImagePipeline, OriginalDiTPipeline
from noisycond.sampling import noise_shape, sample, sample_from_noise


pytestmark = pytest.mark.usefixtures("one_thread")
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
COLOURS = ["red", "green", "blue", "yellow", "cyan", "magenta"]


def make(kind: str):
    torch.manual_seed(0)
    scheduler = DDIMScheduler(**BETAS, clip_sample=False)
    if kind == "ldm":
        first_stage = tiny_vq(scaling_factor=1.0).eval()
        pipeline = LDMClassToImagePipeline(tiny_unet().eval(), ClassEmbedder(10, 12).eval(), scheduler, first_stage)
    else:
        size = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8, "patch_size": 2}
        transformer = DiTTransformer2DModel(**size, in_channels=4, out_channels=8, num_embeds_ada_norm=1000).eval()
        pipeline = (DiTPipeline if kind == "dit" else OriginalDiTPipeline)(transformer, tiny_kl(4).eval(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module", params=["ldm", "dit", "original dit"])
def pipeline(request):
    return make(request.param)


def arrays(images) -> np.ndarray:
    return np.stack([np.array(image, dtype=float) for image in images])


def tiles(*colours, size=(8, 8)):
    return [Image.new("RGB", size, colour) for colour in colours]


def places(picture: Image.Image, colour: str) -> tuple[float, float]:
    """The middle of a colour's pixels: x and y."""
    wanted = np.array(Image.new("RGB", (1, 1), colour))[0, 0]
    rows, columns = (np.array(picture) == wanted).all(-1).nonzero()
    return columns.mean(), rows.mean()


class TestSampleFromNoise:
    @pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
    def test_equals_plain_sampling_with_that_noise(self, pipeline, guidance_scale):
        settings = {"guidance_scale": guidance_scale, "num_inference_steps": 2}
        plain = sample(pipeline, [3, 7], [0, 5], seed=1, **settings)
        generators = [randomness.generator_for(1, randomness.Purpose.SAMPLING, number) for number in (0, 5)]
        noise = randn_tensor((2, *noise_shape(pipeline)), generators)
        assert np.array_equal(arrays(sample_from_noise(pipeline, [3, 7], noise, **settings)), arrays(plain))
        other = sample_from_noise(pipeline, [3, 7], -noise, **settings)
        assert np.abs(arrays(other) - arrays(plain)).max() > 1

    def test_diffusers_draws_its_own_noise_again_afterwards(self):
        dit = make("dit")
        with pytest.raises(RuntimeError, match="not once of"):
            sample_from_noise(dit, [3], torch.zeros(2, 4, 8, 8), guidance_scale=1.0, num_inference_steps=1)
        assert pipeline_dit.randn_tensor is randn_tensor


class TestWalk:
    def walk(self, pipeline, **options):
        options = {"positions": 4, "seed": 0, "guidance_scale": 2.0, "num_inference_steps": 2} | options
        return circular_walk(pipeline, 3, **options)

    def test_position_0_is_plain_sampling_with_the_first_noise(self, pipeline):
        first = randomness.normal(0, randomness.Purpose.LATENT_WALK, torch.arange(2), noise_shape(pipeline))[:1]
        plain = sample_from_noise(pipeline, [3], first, guidance_scale=2.0, num_inference_steps=2)
        found = self.walk(pipeline, batch_size=1)
        assert len(found) == 4 and np.array_equal(arrays(found[:1]), arrays(plain))

    def test_the_circle_closes_and_neighbours_are_nearer_than_opposites(self, pipeline):
        found = arrays(self.walk(pipeline, positions=12))
        distances = np.sqrt(((found[:, None] - found[None]) ** 2).mean((2, 3, 4)))
        neighbours = [distances[n, (n + 1) % 12] for n in range(12)]
        opposites = [distances[n, (n + 6) % 12] for n in range(12)]
        # The step from the last to the first is one like the others.
        assert 0 < max(neighbours) < 2 * np.mean(neighbours)
        assert max(neighbours) < min(opposites)

    def test_batches_do_not_matter(self, pipeline):
        apart = np.abs(arrays(self.walk(pipeline, batch_size=3)) - arrays(self.walk(pipeline)))
        assert apart.max() <= 1

    def test_seeds_are_different_circles(self, pipeline):
        assert np.abs(arrays(self.walk(pipeline, seed=1)) - arrays(self.walk(pipeline))).max() > 1

    def test_a_scheduler_with_noise_of_its_own_is_passed_over_and_kept(self):
        ldm = make("ldm")
        expected = arrays(self.walk(ldm))
        own = ldm.scheduler = DDPMScheduler.from_config(ldm.scheduler.config)
        state = torch.random.get_rng_state()
        assert np.array_equal(arrays(self.walk(ldm)), expected)
        assert ldm.scheduler is own and torch.equal(torch.random.get_rng_state(), state)

    def test_no_positions_are_refused(self):
        with pytest.raises(InputError, match="at least one position"):
            self.walk(make("ldm"), positions=0)


class TestCircle:
    shape = (3, 16, 16)

    def at(self, *turns):
        return circle_of_noise(0, self.shape, torch.tensor(turns, dtype=torch.float64) * 2 * math.pi)

    def test_a_full_turn_comes_back(self):
        start, full, half = self.at(0, 1, 0.5)
        assert (start - full).abs().max() < 1e-6
        assert (start + half).abs().max() < 1e-6

    def test_noise_keeps_its_variance(self):
        noise = self.at(0, 0.125, 0.3, 0.6)
        assert noise.dtype == torch.float32 and noise.shape == (4, *self.shape)
        assert (noise.flatten(1).std(1) - 1).abs().max() < 0.1

    def test_a_quarter_turn_is_independent(self):
        start, quarter = self.at(0, 0.25).flatten(1)
        assert torch.corrcoef(torch.stack([start, quarter]))[0, 1].abs() < 0.1


class TestSideBySide:
    def test_each_run_has_its_grid_in_order_under_a_caption(self):
        picture = side_by_side({"clean": tiles(*COLOURS[:2]), "corrupt": tiles(*COLOURS[2:4])}, columns=1)
        (x0, y0), (x1, y1), (x2, y2), (x3, y3) = (places(picture, colour) for colour in COLOURS[:4])
        assert x0 == x1 < x2 == x3 and y0 == y2 < y1 == y3
        above = np.array(picture)[: int(y0 - 24)]
        assert (above[:, : int((x0 + x2) / 2)] < 100).any() and (above[:, int((x0 + x2) / 2) :] < 100).any()

    def test_a_long_name_is_not_cut(self):
        short, long = (side_by_side({name: tiles("red")}, columns=1) for name in ("a", "a very long name " * 5))
        assert long.width > 3 * short.width
        dark = (np.array(long) < 100).all(-1).any(0).nonzero()[0]
        assert dark.min() > 0 and dark.max() < long.width - 1

    def test_small_images_are_enlarged_and_large_ones_are_not(self):
        assert side_by_side({"a": tiles("red", size=(8, 8))}, columns=1).height >= 48
        assert side_by_side({"a": tiles("red", size=(256, 256))}, columns=1).width < 270

    @pytest.mark.parametrize("runs", [{}, {"a": []}, {"a": tiles("red"), "b": tiles("red", "blue")}])
    def test_unequal_numbers_are_refused(self, runs):
        with pytest.raises(InputError, match="as many images of each run"):
            side_by_side(runs, columns=1)


class TestNearestNeighbours:
    def test_a_row_per_sample_nearest_first(self):
        train = [tiles(*COLOURS[2:4], size=(16, 16)), tiles(*COLOURS[4:6])]
        picture = nearest_neighbours(tiles(*COLOURS[:2]), train, [[0.1, 0.2], [0.31234, 4000.0]])
        at = {colour: places(picture, colour) for colour in COLOURS}
        assert at["red"][0] < at["blue"][0] < at["yellow"][0]
        assert at["red"][1] == at["blue"][1] == at["yellow"][1] < at["green"][1] == at["cyan"][1] == at["magenta"][1]

    def test_distances_stand_below_their_images(self):
        images = [tiles("red")], [tiles("blue")]
        one, other = (np.array(nearest_neighbours(images[0][0], images[1], [[d]])) for d in (0.5, 0.25))
        rows, columns = (one != other).any(-1).nonzero()
        x, y = places(Image.fromarray(one), "blue")
        assert rows.min() > y and abs(columns.mean() - x) < 16

    @pytest.mark.parametrize(
        "train, distances", [([], []), ([tiles("red")], [[]]), ([[]], [[]]), ([tiles("red")], [[1, 2]])]
    )
    def test_unequal_numbers_are_refused(self, train, distances):
        with pytest.raises(InputError, match="as many training images"):
            nearest_neighbours(tiles("blue"), train, distances)


class TestSaveWalk:
    @pytest.mark.parametrize("ending", ["webp", "gif"])
    def test_strip_and_animation_hold_every_image_and_loop(self, tmp_path, ending):
        strip, animation = tmp_path / "walk.png", tmp_path / f"walk.{ending}"
        save_walk(tiles(*COLOURS), strip, animation)
        with Image.open(strip) as picture:
            xs = [places(picture, colour)[0] for colour in COLOURS]
        assert xs == sorted(xs) and picture.width > 6 * 48
        with Image.open(animation) as moving:
            assert moving.n_frames == 6 and moving.info["loop"] == 0 and min(moving.size) >= 128
            for number, colour in enumerate(COLOURS):
                moving.seek(number)
                wanted = np.array(Image.new("RGB", moving.size, colour), dtype=int)
                assert np.abs(np.array(moving.convert("RGB"), dtype=int) - wanted).max() <= 2
                assert moving.info["duration"] == 100

    def test_another_ending_is_refused_before_anything_is_written(self, tmp_path):
        with pytest.raises(InputError, match=r"\.webp or \.gif"):
            save_walk(tiles("red"), tmp_path / "walk.png", tmp_path / "walk.mp4")
        assert not list(tmp_path.iterdir())
