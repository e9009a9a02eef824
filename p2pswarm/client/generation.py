"""Text from a session: transformers' own `generate`, in a thread, over a model that calls the session for its blocks.

`generate_in_session` is blocking and is all there is to generation; `GeneratingSession` runs it for async programs and
streams the tokens, `models/` calls it from blocking ones.

A session goes on where it stopped: `generate` takes only the new tokens and puts the ones before in front itself, so
that repetition penalties and the like see the whole text while the servers run only what they have not seen.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import trio
from transformers import PreTrainedModel

from p2pswarm.blocks.client_model import SwarmCache
from p2pswarm.client.config import ClientConfig
from p2pswarm.client.dispatch import ActiveSession, activated
from p2pswarm.client.history import TokenHistory
from p2pswarm.client.local_blocks import LocalBlocks
from p2pswarm.client.model_servers import ModelServers
from p2pswarm.client.session import Session
from p2pswarm.client.token_stream import Generation, GenerationStopped, TokenFeed, TokenStream
from p2pswarm.client.tuning import Tuning
from p2pswarm.core.errors import ConfigError
from p2pswarm.rpc.client import RpcClient

Prompt = torch.Tensor | Sequence[int] | None


def generate_in_session(
    model: PreTrainedModel,
    generate: Callable[..., Any],
    session: Session,
    inputs: torch.Tensor | None,
    options: dict[str, Any],
) -> Any:
    """What `generate`, which is transformers' of `model`, returns: `inputs`, the new tokens, and what follows them.

    Blocking.
    """
    before = session.history
    mask = options.pop("attention_mask", None)
    if mask is None and inputs is not None:
        mask = guessed_mask(inputs, model.generation_config, options)
    text = text_so_far(session, inputs, mask)
    if options.get("use_cache", True):
        options["past_key_values"] = cache = SwarmCache()
        cache.position = min(session.position, before.length if before is not None else 0, text.length - 1)
    try:
        result = generate(text.token_ids, attention_mask=text.attention_mask, **options)
    except GenerationStopped:
        raise  # whoever stopped it knows how many tokens were taken
    except BaseException:
        session.go_back_to(before)
        raise
    sequences = result if isinstance(result, torch.Tensor) else result.sequences
    if sequences.shape[0] == text.num_rows and session.num_rows in (None, text.num_rows):
        session.history = text.followed_by(sequences[:, text.length :])
    else:
        session.history = None
    if before is None:
        return result
    new = sequences[:, before.length :]
    if isinstance(result, torch.Tensor):
        return new
    result.sequences = new
    return result


def text_so_far(session: Session, inputs: torch.Tensor | None, attention_mask: torch.Tensor | None) -> TokenHistory:
    """The session's tokens and the new ones. A mask is for the new tokens, or for all."""
    before = session.history
    if before is None and session.position > 0:
        raise ConfigError(
            "the session's tokens are not known (it was used for beam search, several answers to one prompt, or raw "
            "hidden states); set session.position = 0 to start over, or open another session"
        )
    if inputs is None:
        if before is None:
            raise ConfigError("generate needs input_ids: the session holds no tokens yet")
        return before
    if before is None:
        return TokenHistory.starting_with(inputs, attention_mask)
    if attention_mask is not None and attention_mask.shape[1] == before.length + inputs.shape[1]:
        attention_mask = attention_mask[:, before.length :]
    return before.followed_by(inputs, attention_mask)


def guessed_mask(token_ids: torch.Tensor, defaults: Any, options: dict[str, Any]) -> torch.Tensor | None:
    """Where no mask is given, pad tokens are padding, unless they also end texts: transformers' own rule."""
    pad_token_id = options.get("pad_token_id", defaults.pad_token_id)
    ends = options.get("eos_token_id", defaults.eos_token_id)
    if pad_token_id is None or pad_token_id in (ends if isinstance(ends, list) else [ends]):
        return None
    return token_ids.ne(pad_token_id)


class GeneratingSession(Session):
    """A session that makes text. `shell` is the model's own class with its blocks in the swarm."""

    def __init__(
        self,
        shell: PreTrainedModel,
        servers: ModelServers,
        rpc: RpcClient,
        config: ClientConfig,
        *,
        max_length: int,
        adapter: str | None = None,
        tuning: Tuning | None = None,
        prefix: torch.Tensor | None = None,
        nursery: trio.Nursery,
        local: LocalBlocks | None = None,
    ) -> None:
        super().__init__(
            servers,
            rpc,
            config,
            max_length=max_length,
            adapter=adapter,
            tuning=tuning,
            prefix=prefix,
            nursery=nursery,
            local=local,
        )
        self._shell = shell
        self._latest: Generation | None = None

    def close(self) -> None:
        super().close()
        if self._latest is not None:
            self._latest.feed.stop()

    async def complete(self, prompt: Prompt = None, **options: Any) -> Any:
        """What transformers' `generate(prompt, **options)` returns: batches, beams and every other option included.

        `prompt` holds the tokens that are new to the session: [batch, tokens], or one sequence.
        """
        self._refuse_a_second()
        if self._latest is not None:
            await self._latest.finished.wait()
        return await trio.to_thread.run_sync(self._generate, as_batch(prompt), options)

    def generate(self, prompt: Prompt = None, **options: Any) -> TokenStream:
        """The generated token ids of one sequence, as they come. Takes every option of transformers' `generate`.

        Left early, the session goes on from the last token that was taken.
        """
        inputs = as_batch(prompt)
        if inputs is not None and inputs.shape[0] != 1:
            raise ConfigError(f"tokens of one sequence can be streamed, got {inputs.shape[0]}; use complete()")
        self._refuse_a_second()
        before, self._latest = self._latest, Generation(TokenFeed(trio.lowlevel.current_trio_token()))
        self._nursery.start_soon(self._run, self._latest, before, inputs, options)
        return TokenStream(self._latest, self._config.stop_grace_s)

    def _refuse_a_second(self) -> None:
        if self._latest is not None and self._latest.is_wanted:
            raise ConfigError("the session is still generating: read its tokens to the end, or aclose() them")

    async def _run(
        self, generation: Generation, before: Generation | None, inputs: torch.Tensor | None, options: dict[str, Any]
    ) -> None:
        options["streamer"] = generation.feed
        try:
            if before is not None:
                await before.finished.wait()
            text = text_so_far(self, inputs, options.get("attention_mask"))
            with generation.scope:
                await trio.to_thread.run_sync(self._generate, inputs, options)
        except GenerationStopped:
            self.go_back_to(text.followed_by(torch.tensor([generation.taken], dtype=text.token_ids.dtype)))
        except Exception as error:  # noqa: BLE001  # nothing is lost: raised where the tokens are read
            generation.failure = error
        finally:
            generation.feed.close()
            generation.finished.set()

    def _generate(self, inputs: torch.Tensor | None, options: dict[str, Any]) -> Any:
        with activated(ActiveSession(self, trio.from_thread.run)):
            shell: Any = self._shell
            return generate_in_session(shell, shell.generate, self, inputs, options)


def as_batch(prompt: Prompt) -> torch.Tensor | None:
    """[batch, tokens] of one sequence or of many."""
    if prompt is None:
        return None
    token_ids = prompt if isinstance(prompt, torch.Tensor) else torch.tensor(list(prompt), dtype=torch.long)
    if token_ids.ndim == 1:
        token_ids = token_ids[None]
    if token_ids.ndim != 2 or token_ids.shape[1] == 0:
        raise ConfigError(f"a prompt is token ids [batch, tokens], got shape {list(token_ids.shape)}")
    return token_ids
