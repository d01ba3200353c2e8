import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as F

from datasets.views import Renderer, ViewPlan, random_boxes, share_per_chunk

PLAIN = Renderer(crop_px=28, mean=(0, 0, 0), std=(1 / 255,) * 3)


def patches(count: int, side: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("transform", ["weak", "strong", "weak_strong", "strong_v2"])
def test_render_equals_torchvision_on_every_patch(transform):
    x = patches(40)
    draws = ViewPlan(transform, 0.08, 32, 28).draw(40, np.random.default_rng(0))
    ours = PLAIN(x, torch.from_numpy(draws))
    for patch, draw, got in zip(x, draws, ours, strict=True):
        top, left, height, width, flip_x, flip_y, shift_x, shift_y = draw
        image = patch.permute(2, 0, 1).float()
        image = F.affine(image, 0.0, [int(shift_x), int(shift_y)], 1.0, [0.0, 0.0])
        image = F.resized_crop(image, int(top), int(left), int(height), int(width), [28, 28], antialias=True)
        image = F.hflip(image) if flip_x else image
        image = F.vflip(image) if flip_y else image
        torch.testing.assert_close(got, image, atol=2e-3, rtol=0)


def test_whole_patch_is_the_antialiased_resize_and_no_resize_is_exact():
    x = patches(3, 64)
    expected = F.resize(x.permute(0, 3, 1, 2).float(), [28, 28], antialias=True)
    torch.testing.assert_close(PLAIN(x), expected, atol=2e-3, rtol=0)
    small = patches(3, 28)
    assert torch.equal(PLAIN(small), small.permute(0, 3, 1, 2).float())


def test_boxes_have_the_distribution_of_torchvision():
    ours = random_boxes(4000, 64, 0.2, np.random.default_rng(0))
    torch.manual_seed(0)
    image = torch.zeros(3, 64, 64)
    theirs = np.array([RandomResizedCrop.get_params(image, (0.2, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)])
    from scipy.stats import ks_2samp

    for column in range(4):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    assert (ours[:, 0] + ours[:, 2] <= 64).all()
    assert (ours[:, 1] + ours[:, 3] <= 64).all()


def test_every_patch_has_its_own_crop_unless_chunks_are_asked_for():
    draws = torch.from_numpy(ViewPlan("strong", 0.08, 256, 224).draw(1024, np.random.default_rng(0)))
    assert len({tuple(d) for d in draws[:, :4].tolist()}) > 1000
    shared = share_per_chunk(draws, 4)
    assert len({tuple(d) for d in shared[:, :4].tolist()}) == 4
    assert torch.equal(shared[:, 4:6], draws[:, 4:6])


def test_normalisation_uses_the_given_constants():
    x = patches(2, 28)
    got = Renderer(28, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))(x)
    expected = F.normalize(x.permute(0, 3, 1, 2).float() / 255, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    torch.testing.assert_close(got, expected)
