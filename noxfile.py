"""The drop-in under the releases of diffusers it is for: `nox`, each in an environment of its own."""

import nox

DIFFUSERS = ("0.36.0", "0.40.0", "0.42.1")


@nox.session
@nox.parametrize("diffusers", DIFFUSERS)
def dropin(session: nox.Session, diffusers: str) -> None:
    """The tests of the integration, with one release."""
    session.install("-r", "requirements.txt")
    session.install(f"diffusers=={diffusers}", "httpx")
    session.run("pytest", "tests/integrations", "-m", "slow or not slow")
