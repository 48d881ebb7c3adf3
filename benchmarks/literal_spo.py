"""SPO by the order of work that its paper and public code spell out (arXiv 2406.04314), to measure ours against.

What it does on purpose: the LoRA stays beside the weights, the prompts pass the text encoders in every rollout, each
step's candidates are decoded and scored before the next step begins, the preference model computes its adaLN in every
forward and reads every prompt K times a step, winner and loser pass the policy and a full copy of the UNet each on
their own, and every step's figures are read back with ``.item()``. As in the public code the preference model's prompts
are tokenized once a rollout, the negative prompt is encoded once a run, and the candidates' predictions are used again
for the next step. Settings, weights, noise, shuffling, gradient clipping and optimizer are those of the trainer that it
is compared with; it has neither inner steps nor a threshold schedule.
"""

from __future__ import annotations

import copy
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpref.models.loading import DTYPES, load_unet, load_vae, model_dir_of
from fastpref.models.prompt_book import prompt_id
from fastpref.models.step_preference_file import load_step_preference, resolve_step_preference
from fastpref.train.optim import build_optimizer, learning_rate_at
from fastpref.train.stepwise import StepwiseTrainer
from fastpref_kernels import derive_keys, keyed_noise, keyed_uniform_u32


class Clock:
    """Seconds and rows by what they were spent on; spans do not nest."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.rows: Counter[str] = Counter()

    @contextmanager
    def span(self, name: str, rows: int = 0) -> Iterator[None]:
        """Book the time inside, and ``rows``, under ``name``."""
        began = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - began
        self.rows[name] += rows


class Prompts(NamedTuple):
    """N prompts as the UNet takes them."""

    embeds: Tensor  # (N, L, D)
    pooled: Tensor  # (N, P); (N, 0) where the UNet takes none

    def rows(self, index: Tensor) -> Prompts:
        return Prompts(self.embeds[index], self.pooled[index])


@dataclass
class Pairs:
    """M kept pairs: one denoising step from ``x_t`` to the winner and one to the loser."""

    x_t: Tensor  # (M, C, h, w)
    x_w: Tensor
    x_l: Tensor
    step: Tensor  # (M,) int64, index of the denoising step
    prompt: Tensor  # (M,) int64, place of the prompt in the round
    embeds: Tensor  # see Prompts
    pooled: Tensor

    def __len__(self) -> int:
        return len(self.step)

    def rows(self, index: Tensor) -> Pairs:
        """Those rows."""
        return Pairs(*(getattr(self, field.name)[index] for field in fields(self)))


def as_prompts(embeds: Tensor, pooled: Tensor | None) -> Prompts:
    """Of what the text encoders give."""
    return Prompts(embeds, embeds.new_empty(len(embeds), 0) if pooled is None else pooled)


class LiteralSPO:
    """The models that a trainer has, copied as they are now, under the literal order of work."""

    def __init__(self, trainer: StepwiseTrainer) -> None:
        self.config, collector = trainer.config, trainer.collector
        self.sampler, self.shape, self.dtype = collector.sampler, collector.shape, collector.dtype
        if self.sampler.inner_steps or len(set(collector.theta)) > 1:
            raise ValueError("the literal trainer has neither inner steps nor a threshold schedule")
        if self.sampler.schedule.prediction_type != "epsilon" or self.config.train != "lora" or self.config.init_lora:
            raise ValueError("the literal trainer is for ε-prediction and a LoRA that starts from nothing")
        self.theta, self.steps = collector.theta[0], self.sampler.steps
        self.device, frozen = trainer.policy.device, DTYPES[self.config.precision]
        self.alphas = self.sampler.schedule.alphas_cumprod.to(self.device)
        folder = model_dir_of(self.config)
        self.policy = copy.deepcopy(trainer.policy.unet)
        self.reference = load_unet(folder, frozen, self.config.unet).to(self.device).eval().requires_grad_(False)
        precision = "fp64" if frozen == torch.float64 else self.config.vae_precision
        self.vae = load_vae(folder, precision, self.policy.device, judged_in=self.config.precision)
        files = resolve_step_preference(self.config.scorer, self.config.clip)
        self.scorer = load_step_preference(files, device=self.device, dtype=frozen).requires_grad_(False)
        self.trained = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        for parameter in self.trained:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        self.texts, negative = collector.book.texts, collector.book.empty()
        self.negative = as_prompts(negative.prompt_embeds, negative.pooled_prompt_embeds)
        ids = [[*collector.book.size, 0, 0, *collector.book.size]]
        self.time_ids = torch.tensor(ids, dtype=torch.float32).to(self.device)
        self.start([parameter.detach().clone() for parameter in self.trained])

    @torch.no_grad()
    def start(self, weights: Sequence[Tensor]) -> None:
        """Begin a run from these weights of the LoRA."""
        for parameter, weight in zip(self.trained, weights, strict=True):
            parameter.copy_(weight)
        self.optimizer, self.clock, self.done = build_optimizer(self.config, self.trained), Clock(), 0

    @torch.no_grad()
    def round(self, prompts: Sequence[str], epoch: int) -> Pairs:
        """Roll out and score ``prompts``; the kept pairs ordered by prompt, then by step."""
        parts, size = [], self.config.rollout_batch_size
        for start in range(0, len(prompts), size):
            parts += self._roll_out(prompts[start : start + size], start, epoch)
        pairs = Pairs(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Pairs)))
        return pairs.rows((pairs.prompt * len(self.steps) + pairs.step).argsort(stable=True))

    def _roll_out(self, prompts: Sequence[str], place: int, epoch: int) -> list[Pairs]:
        """The pairs of N prompts, a part a step."""
        n, k, found = len(prompts), self.sampler.candidates, []
        ids = torch.tensor([prompt_id(prompt) for prompt in prompts])
        with self.clock.span("text encoders", n):
            own = as_prompts(*self.texts.encode(list(prompts)))
            tokens = self.tokens(prompts).repeat_interleave(k, dim=0)
        each = own.rows(torch.arange(n, device=self.device).repeat_interleave(k))
        keys = derive_keys(self.config.seed, epoch, ids, 0, "init").to(self.device)
        x = keyed_noise(keys, self.shape, self.dtype)
        for index in range(self.sampler.plain_steps):
            x = self._stepped(x, self._predict(x, self.steps[index].t, own), ids, index, epoch, 1)[:, 0]
        noise = self._predict(x, self.steps[self.sampler.plain_steps].t, own)
        for index, t in zip(self.sampler.segments, self.sampler.score_timesteps, strict=True):
            pool = self._stepped(x, noise, ids, index, epoch, k)
            x0 = flat = pool.flatten(0, 1)
            if t:
                predicted = self._predict(flat, t, each)
                x0 = self._x0(flat, predicted, t)
            scores = self._score(x0, t, tokens).view(n, k).double()
            winner, loser = scores.argmax(dim=1), scores.argmin(dim=1)
            both = torch.stack([scores.amax(dim=1), scores.amin(dim=1)]).softmax(dim=0)
            kept = (both[0] - both[1] > self.theta).nonzero().flatten()
            at = torch.full_like(kept, index), kept + place
            sides = pool[kept, winner[kept]], pool[kept, loser[kept]]
            found.append(Pairs(x[kept], *sides, *at, *own.rows(kept)))
            chosen = keyed_uniform_u32(derive_keys(self.config.seed, epoch, ids, index, "choice")) * k >> 32
            rows = (torch.arange(n) * k + chosen).to(self.device)
            x = flat[rows]
            if t:
                noise = predicted[rows]
        return found

    def _predict(self, x: Tensor, t: int, prompts: Prompts) -> Tensor:
        """ε under guidance, by the policy with its LoRA beside the weights."""
        with self.clock.span("UNet of the rollout", 2 * len(x)):
            return self.guided(self.policy, x, torch.full((len(x),), t, device=self.device), prompts)

    def _stepped(self, x: Tensor, noise: Tensor, ids: Tensor, index: int, epoch: int, count: int) -> Tensor:
        """(N, count, C, h, w): what the step leads to, with ``count`` draws of its noise."""
        with self.clock.span("noise and steps"):
            mean, sigma = self._mean(x, noise, torch.full((len(x),), index, device=self.device))
            first = index * self.sampler.candidates
            draws = [derive_keys(self.config.seed, epoch, ids, first + j, "candidate") for j in range(count)]
            z = torch.stack([keyed_noise(keys.to(self.device), self.shape, self.dtype) for keys in draws], dim=1)
            return mean[:, None] + sigma[:, None] * z

    def _x0(self, x: Tensor, noise: Tensor, t: int) -> Tensor:
        with self.clock.span("noise and steps"):
            alpha = float(self.alphas[t])
            return (x - math.sqrt(1 - alpha) * noise) / math.sqrt(alpha)

    def _score(self, x0: Tensor, t: int, tokens: Tensor) -> Tensor:
        """(n,) scores of x̂0 (n, C, h, w); ``tokens`` (n, L) holds every prompt K times."""
        n = len(x0)
        with self.clock.span("VAE decode", n):
            images = self.decode(x0)
        with self.clock.span("preference model, image", n):
            pictures = self.scorer.embed_images(images, torch.full((n,), t, device=self.device))
        with self.clock.span("preference model, text", n):
            captions = self.captions(tokens)
        return self.scorer.clip.logit_scale.exp() * (pictures * captions).sum(dim=-1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (n, 3, H, W) of latents (n, C, h, w), all at once."""
        return self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype), return_dict=False)[0]

    @torch.no_grad()
    def captions(self, tokens: Tensor) -> Tensor:
        """(n, E) unit rows of tokens (n, L), by the preference model's text tower."""
        clip = self.scorer.clip
        return F.normalize(clip.text_projection(clip.text_model(input_ids=tokens).pooler_output), dim=-1)

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """(n, L) of the preference model."""
        tokenizer, longest = self.scorer.tokenizer, self.scorer.clip.config.text_config.max_position_embeddings
        length = min(tokenizer.model_max_length, longest)
        options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        return tokenizer(list(prompts), **options).input_ids.to(self.device)

    def train(self, pairs: Pairs, batches: Sequence[Tensor]) -> list[dict[str, float]]:
        """One optimizer step a batch of row numbers; what is logged of each."""
        return [self._step(pairs.rows(rows)) for rows in batches]

    def _step(self, part: Pairs) -> dict[str, float]:
        ratios = [self._ratio(part, part.x_w), self._ratio(part, part.x_l)]
        with self.clock.span("loss"):
            clip = self.config.ratio_clip
            bounded = [ratio if clip is None else ratio.clamp(1 - clip, 1 + clip) for ratio in ratios]
            beta = self.config.beta
            loss = -torch.log(torch.sigmoid(beta * torch.log(bounded[0]) - beta * torch.log(bounded[1]))).mean()
            line = {"loss": loss.item(), "winner": ratios[0].mean().item(), "loser": ratios[1].mean().item()}
        with self.clock.span("backward", 4 * len(part)):
            loss.backward()
        with self.clock.span("optimizer"):
            limit = math.inf if self.config.max_grad_norm is None else self.config.max_grad_norm
            line["grad_norm"] = torch.nn.utils.clip_grad_norm_(self.trained, limit).item()
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate_at(self.config, self.done)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.done += 1
        return line

    def _ratio(self, part: Pairs, end: Tensor) -> Tensor:
        """(m,): how much likelier the step to ``end`` is under the policy than under the reference."""
        times = torch.tensor([step.t for step in self.steps]).to(self.device)
        prompts, t = Prompts(part.embeds, part.pooled), times[part.step]
        with self.clock.span("policy forward", 2 * len(part)):
            own = self.guided(self.policy, part.x_t, t, prompts)
        with self.clock.span("reference forward", 2 * len(part)), torch.no_grad():
            reference = self.guided(self.reference, part.x_t, t, prompts)
        with self.clock.span("loss"):
            densities = [self._log_density(part, noise, end) for noise in (own, reference)]
            return torch.exp(densities[0] - densities[1])

    def _log_density(self, part: Pairs, noise: Tensor, end: Tensor) -> Tensor:
        mean, sigma = self._mean(part.x_t, noise, part.step)
        density = -((end - mean) ** 2) / (2 * sigma**2) - torch.log(sigma) - math.log(math.sqrt(2 * math.pi))
        return density.mean(dim=(1, 2, 3))

    def _mean(self, x: Tensor, noise: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """μ (N, C, h, w) and σ (N, 1, 1, 1) of DDIM's steps ``index`` (N,) (arXiv 2010.02502, equations 12 and 16)."""
        grid = torch.tensor(self.steps).to(self.device)  # (S, 2): t, t_prev
        now, before = (self.alphas[times[index]] for times in grid.unbind(dim=1))
        variance = self.config.eta**2 * (1 - before) / (1 - now) * (1 - now / before)
        numbers = now.sqrt(), (1 - now).sqrt(), before.sqrt(), (1 - before - variance).sqrt(), variance.sqrt()
        root, root_beta, root_before, direction, sigma = (value.to(x.dtype).view(-1, 1, 1, 1) for value in numbers)
        return root_before * ((x - root_beta * noise) / root) + direction * noise, sigma

    def guided(self, unet: Any, x: Tensor, t: Tensor, prompts: Prompts) -> Tensor:
        """ε (N, C, h, w) under guidance: one call of 2N rows, in half precision under autocast as accelerate has it."""
        n, dtype = len(x), DTYPES[self.config.precision]
        negative = [part.expand(n, *part.shape[1:]) for part in self.negative]
        embeds, pooled = (torch.cat([without, own]) for without, own in zip(negative, prompts, strict=True))
        more = {"text_embeds": pooled, "time_ids": self.time_ids.expand(2 * n, -1)} if pooled.shape[1] else None
        half = dtype in (torch.bfloat16, torch.float16)
        inputs = torch.cat([x, x]).to(dtype), torch.cat([t, t]), embeds.to(dtype)
        with torch.autocast(self.device.type, dtype if half else torch.bfloat16, enabled=half):
            noise = unet(*inputs, added_cond_kwargs=more, return_dict=False)[0]
        without, own = noise.to(x.dtype).chunk(2)
        return without + self.config.guidance_scale * (own - without)
