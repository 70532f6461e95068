"""Text rows that stand near the words of the question: the ranking that keeps answers where V2Drop and attention do not.

A question shares words, or words of like meaning, with the sentence that answers it; the answer itself is another word of that
sentence. So a row is worth keeping if a row near it resembles a row of the question.

1. All rows at the entrance of the drop layer are standardised: from each number of a hidden state, the mean of the droppable
   rows is subtracted, and the result is divided by their standard deviation. Without that, two or three numbers that are
   hundreds of times as large as the others (massive activations) decide every cosine.
2. For each row of the question, its cosine with every droppable row is standardised over the droppable rows; negative values
   become zero. A word that is everywhere in the text has no high value anywhere, a rare one has a single very high value.
3. A droppable row takes for each row of the question the largest value within `REACH` rows of it, which counts half at the
   farthest of them.
4. The score is the sum of the squares over the rows of the question.

It is not one of DROPPERS: rows that follow each other are neighbours in a text, but not in a picture or a video. Any span of a
text may be dropped with it; see `load_decoder`. No attention is read, and no value comes to the host. Of several spans, the
last row of one and the first row of the next are neighbours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dropping.base import PrefillState, TokenDropper

# Chosen on questions 0 to 2,089 of text_questions with SmolLM2-135M, by how often the answer's sentence is kept.
REACH, FARTHEST = 12, 0.5
SMALLEST = 1e-6  # standard deviation, below which a number is the same in all rows


class QuestionWords(TokenDropper):
    """Keep the rows near those that resemble the question, from layer 1 on."""

    name = "question-words"
    depths = (1 / 32,)
    leanest = (0.0,)

    def score(self, state: PrefillState) -> Tensor:
        scores = torch.zeros(state.vision_mask.shape, device=state.hidden_states.device)
        for text, question in zip(state.vision_rows(), state.question_rows(), strict=True):
            if len(text):
                scores[text] = relevance(state.hidden_states[text].float(), state.hidden_states[question].float())
        return scores


def relevance(text: Tensor, question: Tensor) -> Tensor:
    """(n,) scores of the droppable rows (n, D), from the rows of the question (Q, D)."""
    mean, deviation = text.mean(0), text.std(0, correction=0).clamp(min=SMALLEST)
    text, question = (F.normalize((rows - mean) / deviation, dim=-1) for rows in (text, question))
    cosines = question @ text.T  # (Q, n)
    spread = cosines.std(-1, correction=0, keepdim=True).clamp(min=SMALLEST)
    likeness = ((cosines - cosines.mean(-1, keepdim=True)) / spread).clamp(min=0)
    return nearby(likeness).square().sum(0)


def nearby(likeness: Tensor) -> Tensor:
    """(Q, n): for each place the largest value (Q, n) within REACH places, each times a weight that falls to FARTHEST."""
    distance = torch.arange(-REACH, REACH + 1, device=likeness.device).abs()
    weights = 1 - (1 - FARTHEST) * distance / REACH
    return (F.pad(likeness, (REACH, REACH)).unfold(-1, 2 * REACH + 1, 1) * weights).amax(-1)
