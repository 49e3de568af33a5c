use super::{Datagram, MARKER};
use std::collections::HashSet;

/// What must hold in every story, whatever happens in it; checked on every datagram a gateway sends.
///
/// * **No byte in clear**: no datagram contains the marker that every inner packet carries.
/// * **No (key, IV) pair twice**: an SPI names one key, so no two ESP packets of one world may share
///   SPI and IV, not over rekeys, restarts and moves either. (Two keys under one random SPI would
///   break it too, rightly.)
#[derive(Default)]
pub struct Laws {
    seen: HashSet<([u8; 4], [u8; 8])>,
}

impl Laws {
    /// Checks one datagram that a gateway sends.
    ///
    /// # Panics
    /// If it breaks a law.
    pub fn check(&mut self, datagram: &Datagram) {
        let Datagram {
            from, to, payload, ..
        } = datagram;
        assert!(
            !payload.windows(MARKER.len()).any(|window| window == MARKER),
            "LAW BROKEN: clear text on the wire from {from} to {to}"
        );
        let (Some(spi), Some(iv)) = (field(payload, 0), field(payload, 8)) else {
            return; // a keepalive
        };
        if spi != [0; 4] {
            assert!(
                self.seen.insert((spi, iv)),
                "LAW BROKEN: SPI {spi:02x?} to {to} uses IV {iv:02x?} twice"
            );
        }
    }

    /// How many ESP packets have been checked.
    pub fn esp_packets(&self) -> usize {
        self.seen.len()
    }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn datagram(payload: &[u8]) -> Datagram {
        Datagram {
            from: "192.0.2.1:4500".parse().unwrap(),
            to: "192.0.2.2:4500".parse().unwrap(),
            payload: payload.to_vec(),
            carries: None,
        }
    }

    #[test]
    #[should_panic = "uses IV"]
    fn a_repeated_iv_is_noticed() {
        let mut laws = Laws::default();
        laws.check(&datagram(b"spi1seq1iviviv-1rest"));
        laws.check(&datagram(b"spi1seq1iviviv-2rest"));
        laws.check(&datagram(b"spi2seq1iviviv-1rest"));
        assert_eq!(laws.esp_packets(), 3);
        laws.check(&datagram(b"spi1seq2iviviv-1else"));
    }

    #[test]
    #[should_panic = "clear text"]
    fn clear_text_is_noticed() {
        Laws::default().check(&datagram(b"spi1seq1iviviv-1....CLEAR-TEXT-HERE!...."));
    }
}
