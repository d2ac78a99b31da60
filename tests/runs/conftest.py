"""A local S3 server for the tests of runs at a URL."""

import pytest


@pytest.fixture(scope="module")
def store():
    """The file system of a fresh S3 server with one bucket."""
    import fsspec
    from moto.server import ThreadedMotoServer

    with pytest.MonkeyPatch.context() as patch:
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "a-secret-of-tests")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fs = fsspec.filesystem("s3", skip_instance_cache=True)
        if not fs.exists("bucket"):  # moto keeps the files of the servers before, if there were some
            fs.mkdir("bucket")
        yield fs
        server.stop()


@pytest.fixture
def url(store, request):
    return f"s3://bucket/{request.node.name}"
