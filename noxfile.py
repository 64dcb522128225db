"""The drop-in under the releases of diffusers it is for: `nox`, each in an environment of its own.

The package is that of the working tree, as pytest finds it there; kernels are those that are built in it.
"""

import nox

DIFFUSERS = ("0.36.0", "0.40.0", "0.42.1")
WITHOUT_TORCHAO = ("0.36.0",)  # which cannot be imported beside today's torchao


@nox.session
@nox.parametrize("diffusers", DIFFUSERS)
def dropin(session: nox.Session, diffusers: str) -> None:
    """The tests of the integration, with one release, and with torchao, which the other tests do without."""
    session.install("-r", "requirements.txt")
    session.install(f"diffusers=={diffusers}", "httpx")
    if diffusers not in WITHOUT_TORCHAO:
        session.install("torchao==0.18.0")
    session.run("pytest", "tests/integrations", "-m", "slow or not slow")
