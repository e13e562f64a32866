"""What a training run depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qadeploy import options
from qadeploy.core.metrics import MetricChoice
from qadeploy.data.fields import DataOptions
from qadeploy.evaluation.predictions import DEFAULT_N_BEST
from qadeploy.options import option

FEW_EXAMPLES = 5_000  # below it a run counts as one on few examples


@dataclass(frozen=True, slots=True)
class TrainOptions(DataOptions):
    """Everything that a run depends on. None means: chosen from the data, and recorded in ``run.json``.

    ``dev_data`` chooses the epoch and the settings instead of ``dev_fraction`` of the training questions.
    ``max_train_samples`` and ``max_eval_samples`` keep the first questions, in file order, of the training set (after
    the dev set was carved) and of the dev and held-out sets. ``batch_size`` counts the windows of all processes; a step
    has ``gradient_accumulation_steps`` batches. ``max_answer_len`` and ``null_score_diff_threshold`` replace the values
    that training chooses. ``token`` is recorded nowhere.
    """

    data: str | tuple[str, ...] = option(
        "handbook",
        "handbook, a JSON/JSONL/CSV/parquet file, or hub:NAME. May be given several times, to train on all of them.",
        also=("--train-file",),
    )
    base: str | None = option(
        None,
        "Checkpoint folder or hub name to start from.",
        shown="the base model that ships",
        also=("--model-name-or-path",),
    )
    model_revision: str | None = option(None, "Branch, tag or commit of a base from the hub.", shown="main")
    out: str = option("runs/handbook", "Run folder.", shown="runs/NAME after the data", also=("--output-dir",))
    eval_data: str | None = option(
        None,
        "Held-out data, used only to report scores.",
        shown="the data's own validation split",
        also=("--validation-file",),
    )
    dev_data: str | None = option(
        None, "Data that chooses the epoch and the settings.", shown="carved from the training data"
    )
    dev_fraction: float = option(0.1, "Share of the training questions that chooses the epoch.")
    max_train_samples: int | None = option(
        None, "Train only on the first N questions of the training set.", least=1, shown="all"
    )
    max_eval_samples: int | None = option(
        None, "Score only the first N questions of the dev and held-out sets.", least=1, shown="all"
    )
    epochs: int | None = option(
        None, "Epochs at most.", least=1, shown="2 with --crops, else 3", also=("--num-train-epochs",)
    )
    learning_rate: float | None = option(
        None, "Peak learning rate.", least=0, shown="1e-4 below 5,000 questions, else 1.8e-4"
    )
    batch_size: int | None = option(
        None,
        "Windows per forward pass.",
        least=1,
        shown="16 below 5,000 questions, else 24",
        also=("--per-device-train-batch-size",),
    )
    batch_tokens: int | None = option(
        None,
        "Maximum tokens per forward pass, padding included: many short windows or few long ones; --batch-size limits the windows.",
        least=1,
    )
    gradient_accumulation_steps: int = option(
        1, "Batches per optimiser step: like one batch that is N times as large, in the memory of one.", least=1
    )
    gradient_checkpointing: bool = option(False, "Save memory: recompute activations in the backward pass.")
    weight_decay: float = option(0.01, "AdamW's weight decay.", least=0)
    warmup_ratio: float = option(0.06, "Share of the steps over which the learning rate rises.", least=0, most=1)
    patience: int = option(2, "Epochs without a better dev F1 before training stops.", least=1)
    seed: int = option(13, "Seed of the split, the order and the dropout.", least=0, most=2**32 - 1)
    max_seq_len: int | None = option(
        None, "Longest window in tokens.", least=16, shown="the base's", also=("--max-seq-length",)
    )
    doc_stride: int | None = option(None, "Overlap of neighbouring windows in tokens.", least=0, shown="the base's")
    long_seq_len: int | None = option(
        None,
        "Longest window, in tokens, for a context that does not fit in one window of max_seq_len.",
        least=16,
        shown="the base's, or max_seq_len if that is given",
    )
    bm25_weight: float | None = option(
        None,
        "Weight of a window's BM25 score (words shared with the question) when windows or passages compete.",
        least=0,
        shown="the base's",
    )
    preprocessing_num_workers: int = option(
        1, "Processes that make windows; more than one pays off on large data only.", least=1
    )
    max_answer_len: int | None = option(
        None,
        "Longest answer in tokens.",
        least=1,
        shown="fits 98 % of the training answers",
        also=("--max-answer-length",),
    )
    null_score_diff_threshold: float | None = option(
        None, "'No answer' wins if its logit exceeds the best span's by more than this.", shown="chosen on the dev set"
    )
    n_best_size: int = option(
        DEFAULT_N_BEST, "Candidates per question in nbest_predictions.json; changes nothing else.", least=1
    )
    metric: MetricChoice = option(  # noqa: RUF009 - a Literal
        "auto",
        "How EM and F1 compare texts. squad: SQuAD's script, for English. mixed: any script; a character of Chinese, Japanese "
        "or Thai counts as a word. auto: mixed if over 10 % of the letters of the training data are not Latin.",
    )
    negatives: int | None = option(
        None,
        "Texts without the answer to add per question, so that the model learns to give no answer.",
        least=0,
        most=100,
        shown="1 below 5,000 questions that all have an answer, in one process; else 0",
    )
    crops: int | None = option(
        None,
        "Copies of each question to add, each on a random part of its context, so that few texts are seen in more than one form.",
        least=0,
        most=100,
        shown="1 below 5,000 questions that all have an answer, else 0",
    )
    teacher: str | None = option(None, "Also learn from this bundle, run, checkpoint or hub model (distillation).")
    distill_weight: float = option(0.7, "The teacher's share of the loss.", least=0, most=1)
    distill_temperature: float = option(
        2.0, "Temperature of the teacher's distributions; above 1 they are flatter.", least=0.1, most=100
    )
    unlabelled: str | None = option(None, "Questions and contexts without answers, which the teacher alone labels.")
    layers: int | None = option(None, "Keep this many of the base's layers, evenly spaced.", least=1, shown="all")
    attention_dropout: float = option(
        0.0, "Dropout of the attention weights; 0 allows PyTorch's fused attention.", least=0, most=1
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto",
        "Precision of the arithmetic; auto is bf16 if the hardware supports it natively, else fp32. fp16 needs a GPU.",
    )
    torch_compile: bool = option(False, "Compile the model (torch.compile): the first steps are slow.")
    device: str = options.device()
    report_to: Literal["none", "tensorboard", "mlflow", "wandb"] = option(
        "none",
        "Also send the figures of each epoch to a tracker. tensorboard writes to the run folder; mlflow and wandb read their "
        "environment variables. Each needs its extra.",
    )
    save_steps: int | None = option(None, "Also save every N steps.", least=1, shown="each epoch only")
    cache: bool = options.keep("the windows for the next run on the same data")
    token: str | None = options.hub_token()
    load_timeout: float = options.load_timeout()
    trust_remote_code: bool = options.trust_remote_code()
    allow_pickle: bool = options.allow_pickle()
