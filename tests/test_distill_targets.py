"""Targets on the training device equal the store's own decoding; a subset's loss is that of its tokens."""

import numpy as np
import pytest
import torch

from distill.loss import feature_loss
from distill.targets import decode_targets, match_subset, select_targets
from storage.encodings import BitRound, Fp16, Int8, Zstd, fit_encoding
from storage.records import FeatureSpec
from storage.token_subset import TokenSubset


def tokens(*shape: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    values = generator.normal(size=shape)
    values[..., :2] *= 6  # channels that stand out
    return values.astype(np.float16)


@pytest.mark.parametrize("encoding", [Fp16(), Zstd(), BitRound(), Int8()])
def test_decoding_on_the_device_is_the_encodings_own(encoding: Fp16 | Zstd | BitRound | Int8) -> None:
    true_BTC = tokens(3, 5, 16)
    fitted = fit_encoding(encoding, true_BTC)
    fields = fitted.encode(true_BTC)
    slow_BTC = np.empty_like(true_BTC)
    fitted.decode(fields, slow_BTC)
    fast_BTC = decode_targets({name: torch.from_numpy(values) for name, values in fields.items()}, fitted)
    np.testing.assert_array_equal(fast_BTC.half().numpy(), slow_BTC)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_pairs_are_those_of_the_whole_map(prefix: int) -> None:
    features = FeatureSpec(teacher="made-up", num_prefix_tokens=prefix, grid_hw=(3, 4), channels=8)
    subset = TokenSubset(fraction=0.5)
    full_BTC = torch.from_numpy(tokens(6, features.num_tokens, 8))
    pred_BTC = torch.from_numpy(tokens(6, min(1, prefix) + 12, 8, seed=1))
    positions_BS = torch.from_numpy(np.stack([subset.positions(f"{n}", 0, features.num_tokens) for n in range(6)]))
    stored_BSC = full_BTC.gather(1, positions_BS.unsqueeze(-1).expand(-1, -1, 8))
    pred_NC, target_NC, is_cls_N = match_subset(pred_BTC, stored_BSC, positions_BS, features)

    student_place = {0: 0} if prefix else {}
    student_place |= {prefix + n: min(1, prefix) + n for n in range(12)}  # registers have none
    pairs = [
        (pred_BTC[row, student_place[place]], full_BTC[row, place])
        for row in range(6)
        for place in positions_BS[row].tolist()
        if place in student_place
    ]
    assert torch.equal(pred_NC, torch.stack([pred for pred, _ in pairs]))
    assert torch.equal(target_NC, torch.stack([target for _, target in pairs]))
    places = [place for row in positions_BS.tolist() for place in row if place in student_place]
    assert is_cls_N.tolist() == [place == 0 and prefix > 0 for place in places]


def test_the_loss_over_subsets_is_unbiased() -> None:
    features = FeatureSpec(teacher="made-up", num_prefix_tokens=1, grid_hw=(4, 4), channels=8)
    full_BTC, pred_BTC = torch.from_numpy(tokens(1, 17, 8)).float(), torch.from_numpy(tokens(1, 17, 8, seed=1)).float()
    full_BTC[0, 3] *= 9  # one token carries most of the loss
    losses = []
    for draw in range(4000):
        positions_BS = torch.from_numpy(TokenSubset(fraction=0.25).positions("image", draw, 17))[None]
        stored_BSC = full_BTC.gather(1, positions_BS.unsqueeze(-1).expand(-1, -1, 8))
        pred_NC, target_NC, _ = match_subset(pred_BTC, stored_BSC, positions_BS, features)
        losses.append(float(feature_loss(pred_NC, target_NC, beta=2.0)))
    whole = float(feature_loss(pred_BTC, select_targets(full_BTC, features), beta=2.0))
    standard_error = np.std(losses) / np.sqrt(len(losses))
    assert abs(np.mean(losses) - whole) < 3 * standard_error
    assert standard_error < 0.03 * whole


def test_registers_are_left_out() -> None:
    features = FeatureSpec(teacher="made-up", num_prefix_tokens=5, grid_hw=(2, 2), channels=1)
    targets_BTC = torch.arange(9.0).reshape(1, 9, 1)
    assert select_targets(targets_BTC, features).flatten().tolist() == [0, 5, 6, 7, 8]
