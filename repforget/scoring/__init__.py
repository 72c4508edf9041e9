"""The one place that scores text: token spans, log-probabilities of answers and candidates, generations."""

from repforget.scoring.encode import Encoded, encode, encode_many, encode_prompts, token_batches
from repforget.scoring.generate import answers_match, generate
from repforget.scoring.logprobs import AnswerScores, answer_logprobs, candidate_logprobs
from repforget.scoring.tokens import TokenScores, token_scores

__all__ = [
    "AnswerScores", "Encoded", "TokenScores", "answer_logprobs", "answers_match", "candidate_logprobs", "encode",
    "encode_many", "encode_prompts", "generate", "token_batches", "token_scores",
]  # fmt: skip
