"""The parameters of config.pbtxt."""

from convoynet.protos.inference import model_config_pb2 as pb


def parameter(config: pb.ModelConfig, name: str) -> str:
    """The value of a parameter; "" where it is absent.

    Looked up by its name alone an absent one comes into being, as protobuf's maps have it, and is written out then.
    """
    return config.parameters[name].string_value if name in config.parameters else ""
