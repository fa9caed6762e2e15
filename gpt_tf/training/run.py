"""A run in progress: its model, its data, the calls of `fit` and the results."""

import contextlib
import dataclasses
import hashlib
import logging
import math
from pathlib import Path

import numpy as np
import tensorflow as tf
import tf_keras as keras

from gpt_tf import artifacts
from gpt_tf.distillation.config import DistillationConfig
from gpt_tf.distillation.distiller import Distiller
from gpt_tf.distillation.teacher_cache import KnowledgeStore
from gpt_tf.errors import InputError
from gpt_tf.models.gpt import GPTModel
from gpt_tf.models.optimizer import AdamW
from gpt_tf.parallel import data as strategies
from gpt_tf.parallel.mesh_gpt import MeshGPT
from gpt_tf.parallel.pipeline import Pipeline
from gpt_tf.pretrained.adapter import write_adapter
from gpt_tf.progress import draw_history
from gpt_tf.text.dataset import TokenFile
from gpt_tf.text.tokenizer import Tokenizer, load_tokenizer
from gpt_tf.training import checkpoint
from gpt_tf.training.callbacks import (
    Checkpointer,
    Recorder,
    Sampler,
    TrainingProgress,
)
from gpt_tf.training.lora import LoraGPT
from gpt_tf.training.run_folder import (
    copy_of,
    load_model,
    model_files,
    save_model,
    windows_of,
)
from gpt_tf.training.schedule import WarmupCosine

logger = logging.getLogger(__name__)

_JIT_COMPILE = {"auto": "auto", "on": True, "off": False}


@dataclasses.dataclass
class TrainingResult:
    """What a training run leaves in memory.

    Attributes:
        model: The trained GPTModel, or `QuantizationAwareGPT`.
        tokenizer: Its tokenizer.
        history: Measurements by step, as in `history.json`.
        out: The run's folder.
        validation_loss: Nats per token of the kept weights, or None.
    """

    model: GPTModel
    tokenizer: Tokenizer
    history: dict
    out: Path
    validation_loss: float | None

    @property
    def validation_perplexity(self):
        if self.validation_loss is None:
            return None
        return math.exp(min(self.validation_loss, 700.0))


class Run:
    """A run in progress, built from its folder.

    Args:
        config: Its `TrainingConfig`.
        out: The folder that `preparation.prepare` filled.
        strategy: The `tf.distribute.Strategy` to train under.
        division: The pipeline or mesh that the model is divided by, or None.

    Attributes:
        model: What is fitted: the model or a `Distiller`, compiled.
        trained: The model that is trained and shipped: of a Distiller, its student.
        own_loss: What Keras calls its own loss, in nats per token.
        step, history, best, best_weights: What checkpoints hold beside the variables.
        loss: That of the last step.
    """

    def __init__(self, config, out, strategy, division):
        self.config = config
        self.out = out
        self.strategy = strategy
        self.is_chief = strategies.is_chief(strategy)
        # Somebody may remove it meanwhile; what was trained is written even so.
        self.run_json = (out / "run.json").read_bytes()
        run = artifacts.read_json(out / "run.json", {"made_from?": {str: str}})
        self.made_from = run.get("made_from", {})
        self.tokenizer = load_tokenizer(out)
        self.distillation = config.distillation and DistillationConfig.of(
            config.distillation
        )
        self.own_loss = "loss" if self.distillation is None else "student_loss"
        splits = ("train", "validation")
        self.windows = {split: self._open_windows(split) for split in splits}
        self.knowledge = self._open_knowledge()
        if self.knowledge is not None:
            self.windows["train"] = self.knowledge.windows(
                self.windows["train"].token_file,
                config.batch_size,
                context_length=config.context_length,
                seed=config.seed,
            )
        self.validation_steps = self.windows["validation"].steps_per_epoch
        if config.validation_batches is not None:
            steps = (self.validation_steps, config.validation_batches)
            self.validation_steps = min(steps)
        self.tokens_per_step = config.batch_size * self.windows["train"].context_length
        self.step = 0
        self.loss = None
        self.history = {"steps": [], "validations": []}
        self.best = {"loss": None, "step": 0, "waited": 0}
        self.best_weights = None
        keras.utils.set_random_seed(config.seed)
        with strategy.scope():
            self.trained = self._new_model(division)
            self.model = self._compiled()

    def _open_windows(self, split):
        token_file = TokenFile.open(self.out / "data" / f"{split}.tokens")
        token_file.check_fits(self.tokenizer.vocab_size)
        written_with = token_file.manifest.get("tokenizer_fingerprint")
        if written_with != self.tokenizer.fingerprint():
            raise InputError(
                f"{token_file.path} expects the tokenizer that it was written with. "
                f"Received: another one in {self.out}. Put the right tokenizer.json "
                "back, or start again with --overwrite."
            )
        return windows_of(token_file, self.config, split == "train", self.tokenizer)

    def _open_knowledge(self):
        """Open what the teacher predicts, where it is stored."""
        path = self.out / "knowledge"
        if self.distillation is not None and self.distillation.knowledge is not None:
            path = self.distillation.knowledge
        elif self.distillation is None or not path.is_dir():
            return None
        knowledge = KnowledgeStore.open(path)
        knowledge.check_fits(
            token_file=self.windows["train"].token_file, tokenizer=self.tokenizer
        )
        return knowledge

    def _new_model(self, division):
        """Build the model that training starts from, on the devices it belongs to."""
        config = self.config
        is_pipeline = isinstance(division, Pipeline)
        with division.scope() if is_pipeline else contextlib.nullcontext():
            if config.init_from is None and config.distillation is None:
                model = GPTModel(
                    self.tokenizer.vocab_size,
                    config.embedding_dim,
                    config.num_layers,
                    config.num_heads,
                    context_length=config.context_length,
                    feedforward_dim=config.feedforward_dim,
                    dropout=config.dropout,
                    tie_embeddings=config.tie_embeddings,
                )
            else:
                model = load_model(self.out / "initial")[0]
        if config.lora is not None:
            return LoraGPT(model, config.lora)
        is_mesh = division is not None and not is_pipeline
        return MeshGPT(model, division) if is_mesh else model

    def _compiled(self):
        config, model, losses = self.config, self.trained, {}
        if self.distillation is not None:
            model = Distiller(teacher=self._load_teacher(), student=model)
            losses = self.distillation.compile_arguments()
            losses["on_policy_seed"] = config.seed
        final = config.final_learning_rate
        schedule = WarmupCosine(
            config.learning_rate,
            config.learning_rate / 10 if final is None else final,
            config.warmup_steps,
            config.steps,
        )
        optimizer = AdamW(
            schedule,
            weight_decay=config.weight_decay,
            beta_2=config.beta_2,
            global_clipnorm=config.global_clipnorm,
        )
        model.compile(
            optimizer=optimizer,
            jit_compile=_JIT_COMPILE[config.jit_compile],
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            **losses,
        )
        model.optimizer.build(model.trainable_variables)
        if hasattr(self.trained, "freeze_ranges"):
            share = self.trained.quantization.freeze_ranges_at
            frozen_at = None if share == 1 else int(share * config.steps)
            self.trained.freeze_ranges(frozen_at)
        return model

    def _load_teacher(self):
        """Load the teacher that the student began with, where it has to run along."""
        if self.knowledge is not None:
            return None
        path = self.distillation.teacher
        if artifacts.sha256_of(*model_files(path)) != self.made_from.get("teacher"):
            raise InputError(
                f"The student in {self.out} expects the teacher that it began with. "
                f"Received: another model in {path}. Put the first one back, or start "
                "again with --overwrite."
            )
        return load_model(path)[0]

    def train(self, callbacks, verbose):
        """Train to the last step, and write the results; return a `TrainingResult`."""
        own = [Recorder(self), Checkpointer(self)]
        if self.config.sample_every:
            own.append(Sampler(self))
        if self.is_chief:
            logs = str(self.out / "logs")
            own.append(
                keras.callbacks.TensorBoard(logs, update_freq=10, profile_batch=0)
            )
        with contextlib.ExitStack() as stack:
            tf.get_logger().addFilter(_is_no_remark_on_speed)
            stack.callback(tf.get_logger().removeFilter, _is_no_remark_on_speed)
            if verbose and self.is_chief:
                own.append(TrainingProgress(self))
                stack.callback(own[-1].close)
            self._fit([*own, *callbacks])
        return self._finish()

    def _fit(self, callbacks):
        config = self.config
        validation = self._dataset(
            "validation", repeat=False, num_steps=self.validation_steps
        )
        self.model.stop_training = False
        if 0 < config.patience <= self.best["waited"]:
            logger.info("validation had not improved any more: the run stays ended")
            return
        for start, stop, length in _epochs(
            self.step, config.steps, config.validate_every
        ):
            first = start // config.validate_every
            self.model.fit(
                self._dataset("train", start_step=start),
                initial_epoch=first,
                epochs=first + (stop - start) // length,
                steps_per_epoch=length,
                validation_data=validation,
                validation_steps=self.validation_steps,
                callbacks=callbacks,
                verbose=0,
            )
            if self.model.stop_training:
                break

    def _dataset(self, split, **options):
        """Return a dataset of global batches, or of each worker's part of them."""

        def make(shards, shard):
            windows = self.windows[split]
            return windows.dataset(num_shards=shards, shard=shard, **options)

        if self.strategy.cluster_resolver is None or isinstance(
            self.strategy, tf.distribute.TPUStrategy
        ):
            return make(1, 0)
        return strategies.distribute(self.strategy, make)

    def _finish(self):
        # A callback may have ended training before a checkpoint was due.
        checkpoint.state_of(self)
        validations = self.history["validations"]
        loss = validations[-1]["loss"] if validations else None
        if self.best_weights is not None:
            self.trained.set_weights(self.best_weights)
            loss = self.best["loss"]
            logger.info("kept the weights of step %d, the best", self.best["step"])
        # A worker that left at once would be taken for a crashed one.
        strategies.on_chief(self.strategy, lambda: self._write_results(loss))
        model = self.trained
        if isinstance(model, MeshGPT | LoraGPT):
            model = copy_of(model)
        return TrainingResult(model, self.tokenizer, self.history, self.out, loss)

    def _write_results(self, loss):
        if not (self.out / "run.json").exists():
            with artifacts.atomic_file(self.out / "run.json") as file:
                file.write(self.run_json)
        artifacts.write_json(self.out / "history.json", self.history)
        draw_history(self.history, self.out / "loss.png")
        if isinstance(self.trained, LoraGPT):
            self._write_adapter()
        made_from = {"run": hashlib.sha256(self.run_json).hexdigest()} | self.made_from
        # The last thing: with it the run is finished. A copy without the optimiser,
        # which would take twice the model's bytes and stands in the checkpoints.
        save_model(
            copy_of(self.trained),
            self.tokenizer,
            self.out / "model",
            step=self.step,
            validation_loss=loss,
            made_from=made_from,
        )

    def _write_adapter(self):
        """Write what LoRA has trained, where another library can read it."""
        lora, config = self.trained, self.trained.gpt.get_config()
        adapters = {
            name: tuple(np.asarray(matrix) for matrix in pair)
            for name, pair in lora.adapters.items()
        }
        write_adapter(
            self.out / "adapter",
            config,
            adapters,
            alpha=lora.lora.scale * lora.lora.rank,
            base=self.config.init_from,
            fingerprint=lora.base_fingerprint,
        )


def _epochs(step, total, every):
    """Yield (start, stop, epoch length) of the calls of `fit` that are left.

    An epoch ends where a validation is due; only the first and the last one may be
    shorter.
    """
    while step < total:
        stop = min(total, (step // every + 1) * every)
        length = stop - step
        if length == every:
            stop = total // every * every
        yield step, stop, length
        step = stop


def _is_no_remark_on_speed(record):
    # Keras's, where drawing progress or a checkpoint takes longer than a small step.
    return "is slow compared to the batch time" not in record.getMessage()
