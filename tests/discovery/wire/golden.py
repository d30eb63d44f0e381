"""What a real ``serf agent`` sent (0.9.4, of Debian), captured on loopback.

It was named a, had the tag role=web, and was joined by a node kv that then pinged it with number 77. Once plain, once
with ``-encrypt`` and `KEY`.
"""

import base64

STREAM = base64.b64decode(
    "CYKkQWxnbwCjQnVm2gDPAA0MIqXkTRo3w0o5eUOmzJwArKrMKSNnCp0wdMowKeOmmYAkh0gFIUNGDqk/AAAEWJXEzZgwctxgTPPGTQBSTcpc"
    "XPUvECk5b9iUGXWnjBhSTsK0KRMqDCkob+TQadZrUymLGMsAGGVljhtTAQoIEFBArCFVRexwpMOESpqlAUylXTuHmwAAwPLq3cu3r9+/gAML"
    "Hky4sOHDiBMrXsy4sePHkCNLnky5suXDpdq+LbNyoxk6OduIoTgHkqoodSjm0QyXFVY6deawdhioKYCA"
)

PACKET_COMPRESSED = base64.b64decode(
    "CYKkQWxnbwCjQnVm2gDVAA8MAGAJABEAOgQIOgUlTB42b8KQ0QZAUABCqoKQUVNnDp02ZdzQWQagpMmSpYrIkfNGzrIf+E6WNIWkTJozaEb6"
    "IIevFqJxaOKNslJmDCaSMksiTbpUZtOTT01GVZqUatVSU8rEcfKmCQFDpDSSkUPqT8kAq5K4GRNGjpswdNK8cROAVJMydMKs+heIFEs2ZUbd"
    "KSOGFFcyZUKFIQWlJZ1mvTYNnePGVIACAgQUKPA1LJmxZc+mXdv2bdy5de/mBWb4DWJRa+wwdtwM0JbJlS9j3hwQ"
)

PACKET_CRC = base64.b64decode(
    "DNPkCocHAgBEADoEhqRBZGRypH8AAAGrSW5jYXJuYXRpb24BpE1ldGGr/4Gkcm9sZaN3ZWKkTm9kZaFhpFBvcnTNvZujVnNupgEFAgIFBQSG"
    "pEFkZHKkfwAAAatJbmNhcm5hdGlvbgGkTWV0YcCkTm9kZaJrdqRQb3J0zYBbo1ZzbqYBBQUCBQU="
)

PACKET_PING = base64.b64decode("AIWkTm9kZaJrdqVTZXFObwGqU291cmNlQWRkcqR/AAABqlNvdXJjZU5vZGWhYapTb3VyY2VQb3J0zb2b")

KEY = base64.b64decode("nPPVfUxY0UCrw8jz+469n2lFXd+id1GUn9VDBfaGuuU=")

STREAM_ENCRYPTED = base64.b64decode(
    "CgAAAPsB9Cvn4Z03tyw+yp0uVrfiTKnkTpUaq0vsdcAte7o9ULWZLFZCDxGA5HTxlCMRRcIYttord5rw9QyY5Ho7iuhkAu4icWoIWMJqV5uB"
    "n6iuNRjewk7kTaKYLSbvu431+Kar2Be5RFK4SntEByZ85cRonGqls5s6o8M4xeIar8Z6Y1BcdrY3s5AcoW6u1fwl20OJg8Q4s87leZFVFsRO"
    "I3oSc6oVoYNb9ucHBo3TvBED3ani2Tp3CA+LzmtwHx1iFaoshVcS5QW8xc5oWRZ8MtSVHruPqdohLGLGIfylWp5nElCIkrC3P5OV6TGVJgJ1"
    "zNRnyMpL1fQLI+rRXg=="
)

PACKET_ENCRYPTED = base64.b64decode(
    "Adt5Fw2lc+GZyHK6DwqKwPc/JauxQYBsHYKrdx3kaw0kJr62cvZ/W1eiNSHeSDpvLvX0IExgq0Z9pSZ9kO4ZF/+wt6kVqV+qBlS46HRYZ0m7"
    "1xgQs3Jt7rhsPoSsVrYcv6PSQyTYOY1HSE544FJzcZCCy6cAiuM2iuNo01FYV1n2ZyFDeyQsFE9ehRc3+Ssu+Rqh2acLKx+/UEn5Hcinbwy9"
    "YOpFfb6YyNsPVwRNLsRbdWnZvMTwyn1xbEjzb3DTRjPLQ+M0xt1O4Pj1qNw1x/m5I46B+Ungt+cJ9608ikT4/q42G44o7wUtSinw7AFFOX9w"
    "qIW1naCFzlG4xa4bb5A="
)
