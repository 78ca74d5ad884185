"""What a check of a run can find, and what the literature advises to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

SHOWN = 5  # examples a finding lists


class Verdict(StrEnum):
    """The outcome of a check; src/results/diagnosis.py says what each means."""

    OK = "ok"
    WATCH = "watch"
    PROBLEM = "problem"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Source:
    """A paper."""

    name: str
    arxiv: str

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}"


ICM = Source("Wen et al. 2025, Unsupervised Elicitation of Language Models", "2506.10139")
CONTEXTUAL = Source("Zhao et al. 2021, Calibrate Before Use", "2102.09690")
BATCH = Source("Zhou et al. 2023, Batch Calibration", "2309.17249")
PROMINENT = Source("Farquhar et al. 2023, Challenges with unsupervised LLM knowledge discovery", "2312.10029")
CHALLENGES = Source("Canavan et al. 2026, Three Concrete Challenges and Two Hopes", "2602.20400")
DEMONSTRATIONS = Source("Min et al. 2022, Rethinking the Role of Demonstrations", "2202.12837")
FLIPPED = Source("Wei et al. 2023, Larger language models do in-context learning differently", "2303.03846")


@dataclass(frozen=True, slots=True)
class Advice:
    """One thing to try, and where it comes from; no source where this project measured it."""

    text: str
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True, slots=True)
class Finding:
    """One check's outcome. text: one sentence with its numbers. details: examples. advice: empty where all is well."""

    key: str
    title: str
    verdict: Verdict
    text: str
    details: tuple[str, ...] = ()
    advice: tuple[Advice, ...] = ()


COLLAPSE_ADVICE = (
    Advice(
        "Subtract the model's lean to one label: --calibrate mean, batch calibration. Contextual calibration does the "
        "same from a content-free prompt.",
        (BATCH, CONTEXTUAL),
    ),
    Advice(
        "Give the search constraints (consistency_id, --consistency gold-free): they are what rules the constant "
        "labeling out; without them the paper's comparisons nearly always ended in it.",
        (ICM,),
    ),
    Advice("Measure before a run whether U of gold-like labels can win at all: icm label --check."),
    Advice(
        "If the true labels may really be so unbalanced, do not trust any unsupervised method blindly: unbalanced sets "
        "are where they were found to fail. Check a sample by hand.",
        (CHALLENGES,),
    ),
)
FROZEN_ADVICE = (
    Advice("Start again from other seeds (--seed) and keep the run with the highest U."),
    Advice(
        "Keep the random start small (--num_seed 8): labelling everything at random, or by zero-shot, trapped the "
        "search; none at all leaves the model without a context.",
        (ICM,),
    ),
    Advice("Start hotter (--initial_T) or cool more slowly (--decay), so that early losses are accepted."),
    Advice(
        "If the seeds alone already have a high U, the last demonstrations may be exploited: --anchors 4 puts the same "
        "ones last for every question (docs/algorithm.md). Models lean to what stands last.",
        (CONTEXTUAL,),
    ),
)
INCONSISTENT_ADVICE = (
    Advice("Raise --consistency_fix_K: more rounds of repair a proposal.", (ICM,)),
    Advice("Lower --alpha: one inconsistent pair then weighs more against predictability.", (ICM,)),
    Advice("Look at the claims: a group that two labels cannot satisfy is often a wrong consistency_id or a bad row."),
)
FLIPS_ADVICE = (
    Advice(
        "Label by the majority of several seeds and leave out, or have checked, what they disagree on. Averaging helps "
        "against noise, and only partly against a concept that is not the one you want.",
        (CHALLENGES,),
    ),
    Advice(
        "Add constraints: removing them raised the variance between runs more than it lowered the best one.", (ICM,)
    ),
    Advice("Take a larger model: the larger of the paper's came closer to what gold labels reach.", (ICM,)),
)
SALIENCE_ADVICE = (
    Advice(
        "Ask whether the model can know this at all: ICM finds concepts that are salient to the model, and ends at "
        "chance on a preference that it cannot guess (the paper's poems about the sun).",
        (ICM,),
    ),
    Advice("Word the question so that it names the concept, and try several wordings with icm label --check."),
    Advice(
        "Suspect another concept that is more prominent than yours (style, length, sycophancy): unsupervised methods "
        "find whatever is most prominent. Read the claims that are labelled most surely.",
        (PROMINENT, CHALLENGES),
    ),
    Advice(
        "Hold it against many-shot with random labels (icm baselines): demonstrations help by their format alone, so a "
        "gain over zero-shot is no sign of the concept.",
        (DEMONSTRATIONS,),
    ),
    Advice("Take a larger base model; what it knows is what can be elicited.", (ICM,)),
)
INVERTED_ADVICE = (
    Advice(
        "Let the search try the mirror (--mirror, the default): single flips cannot cross from one side to the other. "
        "A model follows flipped labels in its context, the larger the better.",
        (FLIPPED,),
    ),
    Advice("Run several seeds and keep the one with the highest U."),
    Advice(
        "Label a dozen claims by hand: which of two mirror images is the true one is all that they need to decide.",
    ),
)
