import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fixclip_core.evaluate import retrieval_metrics


def directions(degrees):
    radians = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], 1).float()


def test_retrieval_by_hand():
    # Angles on a circle: the nearer, the more similar. Image 0 at 0, image 1 at 90, image 2 at 40.
    images = directions([0, 90, 40])
    # Text 0 (image 0) at 10: images rank 0 (10), 2 (30), 1 (80) -> rank 1.
    # Text 1 (image 1) at 45: images rank 2 (5), then 0 and 1 tie at 45 -> the tie counts against it: rank 3.
    # Text 2 (image 2) at 80: images rank 1 (10), 2 (40), 0 (80) -> rank 2.
    texts = directions([10, 45, 80])
    # Image 0: texts 0 (10), 1 (45), 2 (80) -> its own has rank 1.
    # Image 1: texts 2 (10), 1 (45), 0 (80) -> rank 2.
    # Image 2: texts 1 (5), 0 (30), 2 (40) -> rank 3.
    metrics = retrieval_metrics(images, texts, [0, 1, 2], ks=(1, 2, 3))
    assert metrics == pytest.approx(
        {
            "image_to_text_recall_at_1": 1 / 3,
            "image_to_text_recall_at_2": 2 / 3,
            "image_to_text_recall_at_3": 1,
            "text_to_image_recall_at_1": 1 / 3,
            "text_to_image_recall_at_2": 2 / 3,
            "text_to_image_recall_at_3": 1,
        }
    )


def test_any_number_of_texts_per_image():
    images = directions([0, 90])
    # Image 0 has three texts: its best (5) beats the foreign one (30), its worst (85) does not matter.
    metrics = retrieval_metrics(images, directions([5, 60, 85, 30]), [0, 0, 0, 1], ks=(1, 2, 3, 4))
    # Image 1: foreign texts at 85 (5 away) and at 60 (30) lie nearer than its own at 30 (60) -> rank 3.
    assert [metrics[f"image_to_text_recall_at_{k}"] for k in (1, 2, 3)] == [0.5, 0.5, 1]
    # Texts: 5 -> right; 60, 85 -> image 1 is nearer; 30 -> image 0 is nearer.
    assert metrics["text_to_image_recall_at_1"] == 0.25
    assert metrics["text_to_image_recall_at_2"] == 1


def test_a_collapsed_encoder_scores_nothing():
    ones = torch.ones(20, 8)
    metrics = retrieval_metrics(ones, ones, range(20))
    assert set(metrics.values()) == {0.0}


def test_a_tie_between_own_texts_is_no_tie():
    metrics = retrieval_metrics(directions([0, 90]), directions([10, -10, 90]), [0, 0, 1])
    assert metrics["image_to_text_recall_at_1"] == 1


def reference_metrics(images, texts, text_to_image, k):
    normalize = torch.nn.functional.normalize
    scores = (normalize(images.double(), dim=1) @ normalize(texts.double(), dim=1).T).tolist()
    found_images = found_texts = 0
    for i in range(len(images)):
        own = max(scores[i][t] for t, image in enumerate(text_to_image) if image == i)
        found_images += (
            sum(scores[i][t] >= own - 1e-6 for t, image in enumerate(text_to_image) if image != i) < k
        )
    for t, i in enumerate(text_to_image):
        found_texts += sum(scores[j][t] >= scores[i][t] - 1e-6 for j in range(len(images)) if j != i) < k
    return found_images / len(images), found_texts / len(texts)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_blocks_agree_with_a_plain_loop(data):
    num_images = data.draw(st.integers(1, 7))
    extra = data.draw(st.lists(st.integers(0, num_images - 1), max_size=8))
    text_to_image = data.draw(st.permutations([*range(num_images), *extra]))
    # Few distinct whole numbers make ties common.
    row = st.lists(st.integers(-1, 1), min_size=3, max_size=3)
    images = torch.tensor(data.draw(st.lists(row, min_size=num_images, max_size=num_images))).float()
    texts = torch.tensor(
        data.draw(st.lists(row, min_size=len(text_to_image), max_size=len(text_to_image)))
    ).float()
    k = data.draw(st.integers(1, 4))
    expected = reference_metrics(images, texts, text_to_image, k)
    for chunk_size in (1, 3, 4096):
        metrics = retrieval_metrics(images, texts, text_to_image, ks=(k,), chunk_size=chunk_size)
        assert tuple(metrics.values()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("images", "texts", "text_to_image", "message"),
    [
        (torch.ones(2, 3), torch.ones(2, 4), [0, 1], "one width"),
        (torch.ones(2, 3), torch.ones(2, 3), [0], "one for each text"),
        (torch.ones(2, 3), torch.ones(2, 3), [0, 2], "outside the 2 images"),
        (torch.ones(2, 3), torch.ones(2, 3), [0, 0], "image 1 has no text"),
        (torch.ones(0, 3), torch.ones(0, 3), torch.zeros(0, dtype=torch.long), "at least one"),
        (torch.full((1, 3), torch.nan), torch.ones(1, 3), [0], "image features hold nan"),
        (torch.ones(1, 3), torch.full((1, 3), torch.inf), [0], "text features hold nan"),
    ],
)
def test_bad_retrieval_input(images, texts, text_to_image, message):
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(images, texts, text_to_image)
