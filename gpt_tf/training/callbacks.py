"""What happens between the steps of a run: records, checkpoints, samples, progress."""

import logging
import math
import time
import warnings

import numpy as np
import tf_keras as keras

from gpt_tf.progress import StepProgress
from gpt_tf.training import checkpoint

logger = logging.getLogger(__name__)


class _RunCallback(keras.callbacks.Callback):
    def __init__(self, run):
        super().__init__()
        self.run = run


class Recorder(_RunCallback):
    """Count steps, record losses, and decide on stopping: early, or with an error."""

    def __init__(self, run):
        super().__init__(run)
        self.began = self.now = (0.0, 0)
        self.sums = {}

    def on_train_batch_end(self, batch, logs=None):
        run = self.run
        run.step += 1
        self._check_losses(logs or {})
        self.now = (time.perf_counter(), run.step)
        if batch == 0:
            self.began = self.now
            self.sums = {}
        if run.step % 10 == 0 or run.step == 1:
            means = self._means(batch + 1, logs or {})
            if run.own_loss in means:
                means["loss"] = means.pop(run.own_loss)
            run.history["steps"].append({"step": run.step, **means})

    def _check_losses(self, logs):
        losses = {name: logs[name] for name in logs if name.endswith("loss")}
        self.run.loss = losses.get("loss")
        name = checkpoint.first_not_finite(losses)
        if name is not None:
            raise checkpoint.diverged(self.run, f"a {name} of {losses[name]}")

    def _means(self, count, logs):
        """Return the means since they were last asked for.

        Keras's own are since the epoch began, and would hide how the loss falls.
        """
        before = self.sums.get("count", 0)
        sums = {
            key: float(logs[key]) * count
            for key in (self.run.own_loss, "distillation_loss", "token_accuracy")
            if key in logs
        }
        means = {
            key: (total - self.sums.get(key, 0.0)) / (count - before)
            for key, total in sums.items()
        }
        self.sums = {"count": count, **sums}
        return means

    def on_epoch_end(self, epoch, logs=None):
        run, logs = self.run, logs or {}
        if "val_loss" not in logs:
            return
        self._check_losses(logs)
        loss = float(logs[f"val_{run.own_loss}"])
        # Since the first step of the epoch, which may have compiled.
        seconds, steps = np.subtract(self.now, self.began)
        speed = float(steps * run.tokens_per_step / seconds) if steps else 0.0
        logs["tokens_per_second"] = speed
        run.history["validations"].append(
            {
                "step": run.step,
                "loss": loss,
                "perplexity": math.exp(min(loss, 700.0)),
                "token_accuracy": float(logs["val_token_accuracy"]),
                "train_loss": float(logs[run.own_loss]),
                "tokens_per_second": speed,
                **{
                    key: float(logs[f"val_{key}"])
                    for key in ("teacher_agreement", "kl_divergence")
                    if f"val_{key}" in logs and run.knowledge is None
                },
            }
        )
        better = run.best["loss"] is None or loss < run.best["loss"]
        if better:
            run.best = {"loss": loss, "step": run.step, "waited": 0}
        else:
            run.best["waited"] += 1
        patience = run.config.patience
        if patience and better:
            run.best_weights = run.trained.get_weights()
        elif patience and run.best["waited"] >= patience:
            logger.info("validation has not improved for %d rounds: stopping", patience)
            self.model.stop_training = True


class Checkpointer(_RunCallback):
    """Write checkpoints; where a validation is due, after it."""

    def on_train_batch_end(self, batch, logs=None):
        step, config = self.run.step, self.run.config
        if step % config.validate_every and step != config.steps:
            self._save_if_due()

    def on_epoch_end(self, epoch, logs=None):
        self._save_if_due()

    def _save_if_due(self):
        every, step = self.run.config.checkpoint_every, self.run.step
        if step == self.run.config.steps or (every and step % every == 0):
            checkpoint.save(self.run)


class Sampler(_RunCallback):
    """Generate a little text every so many steps, to see what was learnt."""

    def on_train_batch_end(self, batch, logs=None):
        run = self.run
        if run.step % run.config.sample_every:
            return
        checkpoint.state_of(run)  # nothing is drawn from NaN
        prompt = run.config.sample_prompt
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            text = run.trained.generate(
                prompt,
                tokenizer=run.tokenizer,
                max_new_tokens=min(64, run.config.context_length),
                temperature=0.8,
                seed=run.config.seed,
            )
        logger.info("step %d writes:\n%s%s\n", run.step, prompt, text)


class TrainingProgress(_RunCallback):
    """Show a bar with loss, tokens per second and time left, and a line a validation.

    Args:
        run: The run in progress; its step, configuration and history are read.
        console: Where to write; standard output unless given.
    """

    def __init__(self, run, console=None):
        super().__init__(run)
        self.progress = StepProgress("loss   -  ", console)
        self.console = self.progress.console
        self.began = None

    def on_train_begin(self, logs=None):
        if self.progress.task is not None:  # an earlier `fit` of the run began it
            return
        model, config = self.run.trained, self.run.config
        self.console.print(
            f"training {model.count_params():,} parameters on "
            f"{config.steps * self.run.tokens_per_step:,} tokens; "
            "the first step compiles"
        )
        self.progress.update(self.run.step, config.steps)

    def on_train_batch_end(self, batch, logs=None):
        now, step = time.perf_counter(), self.run.step
        shown = {"description": f"loss {logs['loss']:6.3f}"}
        if self.began is None:
            self.began = (now, step)
        else:
            tokens = (step - self.began[1]) * self.run.tokens_per_step
            speed = tokens / max(now - self.began[0], 1e-9)
            shown["note"] = f"{speed:,.0f} tokens/s"
        self.progress.update(step, self.run.config.steps, **shown)

    def on_epoch_end(self, epoch, logs=None):
        if logs and "val_loss" in logs:
            validation = logs[f"val_{self.run.own_loss}"]
            line = (
                f"step {self.run.step:>6}  loss {logs['loss']:.3f}  "
                f"validation {validation:.3f}  "
                f"perplexity {math.exp(min(validation, 700.0)):.2f}  "
                f"accuracy {logs['val_token_accuracy']:.1%}"
            )
            if self.run.distillation is not None and self.run.knowledge is None:
                line += f"  agreement {logs['val_teacher_agreement']:.1%}"
            self.console.print(line)
        self.began = None

    def close(self):
        """Stop redrawing the bar."""
        self.progress.close()
